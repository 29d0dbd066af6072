"""Depth maps as people have them, what is refused of them, and augmentation that keeps distances true."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from cankd_hf.config.data import DataConfig, DepthConfig
from cankd_hf.data.depth.decode import DepthDecoder
from cankd_hf.data.depth.load import load_depth
from cankd_hf.data.depth.transforms import DepthTrainTransform
from cankd_hf.data.generated import generated_splits
from cankd_hf.data.layouts import look
from cankd_hf.errors import InputError

METRES = np.linspace(0.5, 6, 48).reshape(6, 8)
METRES[0, 0] = 0


def png(path: Path, scale: float = 1000) -> None:
    Image.fromarray((METRES * scale).round().astype(np.uint16)).save(path)


def npy(path: Path) -> None:
    np.save(path, METRES.astype(np.float32)[..., None])


def tiff(path: Path) -> None:
    Image.fromarray(METRES.astype(np.float32)).save(path)


def photo(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((8, 6), 90).convert("RGB").save(path)


WRITERS: dict[str, Callable[[Path], None]] = {"png": png, "npy": npy, "tif": tiff}


def described(root: Path, ending: str = "png", **more: Any) -> DataConfig:
    """Two splits with metadata."""
    for split in ("train", "val"):
        lines = []
        for number in range(3):
            photo(root / split / f"{number}.png")
            (root / split / "d").mkdir(exist_ok=True)
            WRITERS[ending](root / split / "d" / f"{number}.{ending}")
            lines.append({"file_name": f"{number}.png", "depth_file_name": f"d/{number}.{ending}"})
        (root / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return DataConfig(path=str(root), **more)


@pytest.mark.parametrize("ending", WRITERS)
def test_depth_maps_of_all_formats_are_metres(ending: str, tmp_path: Path) -> None:
    data = load_depth(described(tmp_path, ending))
    label = data.eval[0]["labels"]
    assert label.dtype == torch.float32 and label[0, 0] == 0 and len(data.train) == 3
    np.testing.assert_allclose(label.numpy(), METRES, atol=6e-4)


@pytest.mark.parametrize(
    "paths", ["{split}/images/{n}.png {split}/depth/{n}.png", "rgb/{split}/{n}.png depth/{split}/{n}.npy"]
)
def test_folders_of_pairs_are_found(paths: str, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for number in range(2):
            image, depth = (tmp_path / one.format(split=split, n=number) for one in paths.split())
            photo(image)
            depth.parent.mkdir(parents=True, exist_ok=True)
            WRITERS[depth.suffix[1:]](depth)
    assert look(tmp_path).layout == "images and depth maps"
    data = load_depth(DataConfig(path=str(tmp_path)))
    assert (len(data.train), len(data.eval)) == (2, 2)
    next(tmp_path.glob("**/train/**/0.png")).with_name("7.png").write_bytes(b"")
    Image.new("RGB", (8, 6)).save(next(tmp_path.glob("**/train/**/7.png")))
    wrong = next(tmp_path.glob("**/7.png"))
    if "depth" not in str(wrong):
        data = load_depth(DataConfig(path=str(tmp_path)))
        assert len(data.train) == 2 and data.facts["skipped"]["count"] == 1
        told = [said for said in data.facts["warnings"] if "no depth map" in said]
        assert told == [
            f"train: 1 of 3 images have no depth map and are left out, first {wrong.relative_to(tmp_path)}"
        ]
    else:
        WRITERS["npy"](wrong.with_name("0.npy"))
        with pytest.raises(
            InputError, match=r"0\.png: expected one depth map of the same name, got .*0\.npy, .*0\.png$"
        ):
            load_depth(DataConfig(path=str(tmp_path)))


def test_names_side_by_side_and_half_of_them_missing(tmp_path: Path) -> None:
    for number in range(3):
        photo(tmp_path / f"{number}_rgb.png")
        png(tmp_path / f"{number}_depth.png")
    data = load_depth(DataConfig(path=str(tmp_path), eval_split=None))
    assert len(data.train) == 3 and data.train.name(1) == "1_rgb.png"
    photo(tmp_path / "test" / "9_rgb.png")
    (tmp_path / "0_depth.png").rename(tmp_path / "7_depth.png")
    data = load_depth(DataConfig(path=str(tmp_path), eval_split=None))
    assert len(data.train) == 2 and data.facts["splits"] == {"train": 2}
    assert {said.split(",")[-1] for said in data.facts["warnings"]} == {" first 0_rgb.png", " first 7_depth.png"} | {
        " got none; it is left out"
    }
    for number in (1, 2):
        (tmp_path / f"{number}_depth.png").rename(tmp_path / f"{number}{number}_depth.png")
    with pytest.raises(InputError, match="got 0 of 3 images with one, first without 0_rgb.png, depth maps without an"):
        load_depth(DataConfig(path=str(tmp_path), eval_split=None))


def test_metadata_without_a_depth_map_for_each_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(3):
        photo(tmp_path / f"{number}.png")
    png(tmp_path / "d.png")
    lines = [{"file_name": f"{number}.png", "depth_file_name": "d.png" if number else None} for number in range(3)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = load_depth(DataConfig(path=str(tmp_path), eval_split=None))
    assert len(data.train) == 2 and "1 images without a depth map are skipped, first 0.png" in caplog.text


def test_tables_hold_depth_maps_too(tmp_path: Path) -> None:
    def content(write: Callable[[Path], None], name: str) -> dict[str, Any]:
        write(tmp_path / name)
        return {"bytes": (tmp_path / name).read_bytes(), "path": name}

    rows = {"image": [content(photo, "i.png")] * 3, "depth_map": [content(tiff, "d.tif")] * 3}
    Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    config = DataConfig(path=str(tmp_path / "train.parquet"), eval_split=None)
    np.testing.assert_allclose(load_depth(config).train[0]["labels"].sum(), METRES.sum(), rtol=1e-3)
    wrong = DataConfig(path=config.path, eval_split=None, depth=DepthConfig(column="disparity"))
    with pytest.raises(InputError, match="disparity"):
        load_depth(wrong)


def decode(values: np.ndarray, **settings: Any) -> torch.Tensor:
    stream = io.BytesIO()
    np.save(stream, values)
    return DepthDecoder(depth=DepthConfig(**settings)).metres(stream.getvalue(), "x.npy")


def test_what_is_no_distance_is_unknown() -> None:
    values = np.array([[np.nan, np.inf, -1.0], [0.0, 0.05, 50.0], [3.0, 10.0, 10.5]])
    wanted = [[0, 0, 0], [0, 0, 0], [3, 10, 0]]
    assert decode(values, min=0.1, max=10.0).tolist() == wanted
    kitti = (np.array([[256, 512, 0]])).astype(np.uint16)
    assert decode(kitti, scale=256).tolist() == [[1, 2, 0]]


def test_wrong_depth_maps_are_told_in_a_line(tmp_path: Path) -> None:
    config = described(tmp_path)
    target = tmp_path / "train" / "d" / "1.png"
    cases: dict[str, Callable[[], None]] = {
        "one number a pixel, got an image of mode RGB": lambda: photo(target),
        "got one of 8 bits": lambda: Image.new("L", (8, 6), 9).save(target),
        "expected the size of its image": lambda: Image.fromarray(np.full((6, 9), 900, np.uint16)).save(target),
        "expected an image that decodes": lambda: target.write_bytes(b"nonsense") and None,
    }
    for said, spoil in cases.items():
        spoil()
        with pytest.raises(InputError, match=said) as error:
            load_depth(config)
        assert "1.png" in str(error.value) and len(error.value.problems) <= 2
    Image.fromarray(np.zeros((6, 8), np.uint16)).save(target)
    data = load_depth(config)
    assert len(data.train) == 2 and "no pixel has a depth" in str(data.facts["skipped"])
    png(target, 1)  # metres as whole numbers
    config.depth = DepthConfig(scale=0.0001)
    assert any("data.depth.scale" in warning for warning in load_depth(config).facts["warnings"])
    with pytest.raises(InputError, match="data.depth.loss: expected ssi or ssi_mad for relative depth"):
        load_depth(DataConfig(path=str(tmp_path), depth=DepthConfig(kind="relative", loss="silog")))


def test_augmentation_keeps_distances_true() -> None:
    """A picture enlarged by 2 is as near again; its depths are those of the pixels it shows, and no others."""
    image = torch.arange(3 * 16 * 16, dtype=torch.uint8).reshape(3, 16, 16)
    depth = torch.rand(16, 16) + 1
    depth[4:8] = 0
    config = DataConfig(path="shapes", image_size=[16, 16], crop_size=[8, 8], scale=[2.0, 2.0], flip=1.0)
    torch.manual_seed(0)
    item = DepthTrainTransform(config)(image, depth)
    assert item["labels"].dtype == torch.float32 and item["labels"].shape == (8, 8)
    seen = (item["labels"][item["labels"] > 0] * 2).unique()
    assert all(torch.isclose(depth, value).any() for value in seen)
    config.depth = DepthConfig(kind="relative")
    torch.manual_seed(0)
    plain = DepthTrainTransform(config)(image, depth)["labels"]
    torch.testing.assert_close(plain, item["labels"] * 2)
    # a picture smaller than the crop: its surroundings have no depth; the limit holds after scaling
    config = DataConfig(path="shapes", image_size=[16, 16], scale=[0.5, 0.5], flip=0, depth=DepthConfig(max=3.0))
    shrunk = DepthTrainTransform(config)(image, depth)["labels"]
    assert (shrunk == 0).sum() >= 16 * 16 - 64 and shrunk.max() <= 3 and (shrunk > 0).any()


def test_the_generated_set_has_true_depth() -> None:
    split = generated_splits({"size": 32, "train": 4}, kind="depths")["train"]
    sample = split.load(2)
    assert torch.equal(sample.image, split.load(2).image) and sample.target is not None
    depth = sample.target.value
    assert 0.9 < depth.min() < 1.3 and 9 < depth.max() <= 10 and depth[-1].max() <= depth[0].max()
