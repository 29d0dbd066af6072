"""Parts of the training images that stand in for missing splits."""

import pytest

from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.folders import slice_of
from cankd_hf.data.common.holdout import held_out, lacking


@pytest.mark.parametrize("size", [2, 3, 4, 5, 9, 10, 37, 1000])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.9])
@pytest.mark.parametrize("roles", [["eval"], ["test"], ["eval", "test"]])
def test_the_parts_are_all_images_each_once(size: int, share: float, roles: list[str]) -> None:
    if size <= len(roles):
        return
    slices = held_out("train[::2]", 2 * size, roles, share)
    parts = [list(slice_of(text, 4 * size)[1]) for text in slices.values()]
    assert list(slices) == ["train", *roles] and all(parts)
    assert sorted(sum(parts, [])) == list(range(0, 4 * size, 2))


def test_which_splits_are_held_out() -> None:
    both = DataConfig(path="x", test_split="test")
    assert lacking(both, ["train"]) == (["eval", "test"], False)
    assert lacking(both, ["train", "val"]) == ([], True)
    assert lacking(both, ["training", "testing"]) == (["eval"], False)
    assert lacking(both, ["train", "validation", "test"]) == ([], False)
    assert lacking(DataConfig(path="x", eval_split="vall", test_split="train[:9]"), ["train"]) == ([], False)
    assert lacking(DataConfig(path="x", eval_split=None), ["train"]) == ([], False)
    assert lacking(DataConfig(path="x", streaming=True), ["train"]) == ([], False)
    assert lacking(DataConfig(path="x", test_split="test", streaming=True), ["train", "val"]) == ([], True)
    assert lacking(DataConfig(path="x", train_split="a"), ["a", "train"]) == ([], False)
    assert lacking(DataConfig(path="x", train_split="train[:9][::2]"), ["train"]) == (["eval"], False)
    for several in ("train[:9]+train[12:]", "train-train[:9]", "train[::2]-train[:9]"):
        assert lacking(DataConfig(path="x", train_split=several), ["train"]) == ([], False)
