"""Data sets of users are checked before anything is trained: one line with the data set, the sample and the fix."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from cankd_hf.config.data import DataConfig
from cankd_hf.data.segmentation.load import load_segmentation
from cankd_hf.errors import InputError
from cankd_hf.features.strides import deepest_stride
from cankd_hf.tasks import DetectionTask

from .detector_trainers import NAMES, STUDENTS, Boxed
from .tiny_trainers import Images, student, teacher, trainer

GOOD = Images(1)[0]
PIXELS, LABELS = GOOD["pixel_values"], GOOD["labels"]
BAD: dict[str, tuple[Any, tuple[str, ...]]] = {
    "other key for the image": ({"image": PIXELS, "labels": LABELS}, ("'pixel_values'", "rename 'image'")),
    "other key for the labels": ({"pixel_values": PIXELS, "label": LABELS}, ("'labels'", "rename 'label'")),
    "no labels": ({"pixel_values": PIXELS}, ("'labels'",)),
    "null labels": ({**GOOD, "labels": None}, ("'labels'",)),
    "a tuple": ((PIXELS, LABELS), ("dict with pixel_values", "tuple")),
    "bytes": ({**GOOD, "pixel_values": torch.zeros(3, 64, 64, dtype=torch.uint8)}, ("torch.uint8", "mean) / std")),
    "0..255": ({**GOOD, "pixel_values": PIXELS.sigmoid() * 255}, ("normalised with the mean", "divide 0..255 by 255")),
    "NaN": ({**GOOD, "pixel_values": PIXELS.where(PIXELS < 2, torch.nan)}, ("finite numbers", "NaN")),
    "inf": ({**GOOD, "pixel_values": PIXELS.where(PIXELS < 2, torch.inf)}, ("finite numbers", "inf")),
    "channels last": ({**GOOD, "pixel_values": PIXELS.permute(1, 2, 0)}, ("[64, 64, 3]", ".permute(2, 0, 1)")),
    "a batch": ({**GOOD, "pixel_values": PIXELS[None]}, ("[1, 3, 64, 64]",)),
    "grey": ({**GOOD, "pixel_values": PIXELS[:1]}, ("[1, 64, 64]", "RGB")),
    "lists": ({**GOOD, "pixel_values": PIXELS.tolist()}, ("tensor", "list")),
    "texts": ({**GOOD, "pixel_values": np.array(["a"])}, ("tensor", "ndarray")),
    "void of another number": ({**GOOD, "labels": LABELS.new_full((64, 64), -100)}, ("semantic_loss_ignore_index",)),
    "8 x 8": ({"pixel_values": PIXELS[:, :8, :8], "labels": LABELS[:8, :8]}, ("at least 32 x 32", "got 8 x 8")),
    "no pixels": ({"pixel_values": PIXELS[:, :0], "labels": LABELS[:0]}, ("at least 32 x 32", "got 0 x 64")),
    "float labels": ({**GOOD, "labels": LABELS.float()}, ("int64", "float32", ".long()")),
    "below 0": ({**GOOD, "labels": LABELS - 1}, ("0..3 or 255 (void)", "[-1]")),
    "too high": ({**GOOD, "labels": LABELS + 2}, ("0..3 or 255 (void)", "[4, 5]")),
    "one label": ({**GOOD, "labels": torch.tensor(1)}, ("mask [H, W]", "shape []")),
    "one-hot": ({**GOOD, "labels": torch.zeros(4, 64, 64).long()}, ("mask [H, W]", "[4, 64, 64]")),
}
LIKE_GOOD: dict[str, Any] = {
    "arrays": {"pixel_values": PIXELS.numpy(), "labels": LABELS.numpy()},
    "float64": {"pixel_values": PIXELS.double(), "labels": LABELS.int()},
    "half": {"pixel_values": PIXELS.half().float().half(), "labels": LABELS.short()},
    "bytes as labels": {"pixel_values": PIXELS, "labels": LABELS.to(torch.uint8)},
    "other keys": {**GOOD, "name": "a"},
}
ONE_SIZE = ({**GOOD, "labels": LABELS[:32]}, ("size of its image, 64 x 64", "32 x 64"))


class Listed(Dataset):
    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class Streamed(IterableDataset):
    """Yields its items anew for each pass, or once, as a generator does; `read` counts them."""

    def __init__(self, *items: Any, once: bool = False) -> None:
        self.items, self.once, self.read = items, once, 0
        self.only = self._pass()

    def _pass(self) -> Iterator[Any]:
        for item in self.items:
            self.read += 1
            yield item

    def __iter__(self) -> Iterator[Any]:
        return self.only if self.once else self._pass()


def said(folder: Path, **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        trainer(folder, **settings)
    (problem,) = caught.value.problems
    assert "\n" not in problem and len(problem) < 400
    return problem


@pytest.fixture(scope="module", autouse=True)
def one_teacher() -> Iterator[None]:
    """Loaded once: these trainers do not train."""
    kept = teacher()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.training.tiny_trainers.teacher", lambda seed=1: kept)
        yield


@pytest.mark.parametrize("name", LIKE_GOOD)
def test_numbers_of_other_types_are_trained_on(tmp_path: Path, name: str) -> None:
    """As the Trainer's own collation takes them."""
    made = trainer(tmp_path, data=Listed(*[LIKE_GOOD[name]] * 2), max_steps=1)
    batch = next(iter(made.get_train_dataloader()))
    assert batch["pixel_values"].dtype == torch.float32 and batch["labels"].dtype == torch.int64
    torch.testing.assert_close(batch["pixel_values"][0], PIXELS, atol=0.01, rtol=0)
    assert batch["labels"][0].equal(LABELS)
    made.train()


@pytest.mark.parametrize("data", [3, {"pixel_values": PIXELS, "labels": LABELS}], ids=["a number", "a sample"])
def test_what_is_no_data_set_is_refused(tmp_path: Path, data: Any) -> None:
    assert said(tmp_path, data=data).startswith("train_dataset: expected a data set, got ")


@pytest.mark.parametrize("name", BAD)
def test_samples_are_refused_before_training(tmp_path: Path, name: str) -> None:
    item, expected = BAD[name]
    for place, settings in (
        ("train_dataset[1]", {"data": Listed(GOOD, item)}),
        ("eval_dataset[1]", {"eval_dataset": Listed(GOOD, item)}),
        ("eval_dataset['b'][0]", {"eval_dataset": {"a": Images(2), "b": Listed(item)}}),
        ("train_dataset[0]", {"data": Streamed(item, GOOD), "max_steps": 1}),
    ):
        problem = said(tmp_path, **settings)
        assert problem.startswith(f"{place}: ") and all(part in problem for part in expected), problem


def test_a_mask_has_the_size_of_its_image_in_training_alone(tmp_path: Path) -> None:
    item, expected = ONE_SIZE
    problem = said(tmp_path, data=Listed(item))
    assert all(part in problem for part in expected)
    assert trainer(tmp_path, eval_dataset=Listed(item)).evaluate()["eval_miou"] >= 0


def test_all_data_sets_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        trainer(tmp_path, data=Listed(), eval_dataset={"a": Listed(BAD["NaN"][0]), "b": Streamed()})
    places = [
        "train_dataset: expected at least one",
        "eval_dataset['a'][0]",
        "eval_dataset['b']: expected at least one",
    ]
    assert [problem.startswith(place) for problem, place in zip(caught.value.problems, places, strict=True)] == [
        True
    ] * 3


def test_data_sets_that_come_later(tmp_path: Path) -> None:
    made = trainer(tmp_path, eval_dataset=Images(2))
    for name in ("NaN", "channels last", "no labels", "too high"):
        item, expected = BAD[name]
        with pytest.raises(InputError) as caught:
            made.evaluate(Listed(GOOD, item))
        assert str(caught.value).startswith("eval_dataset[1]: ") and expected[0] in str(caught.value)
    with pytest.raises(InputError, match=r"test_dataset\[0\]: pixel_values: expected normalised"):
        made.predict(Listed(BAD["bytes"][0]))


def stack(samples: list[Any]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([sample[key] for sample in samples]) for key in ("pixel_values", "labels")}


@pytest.mark.parametrize("name", ["0..255", "NaN", "float labels", "too high"])
def test_a_collator_of_the_user_is_checked_by_its_first_batch(tmp_path: Path, name: str) -> None:
    item, expected = BAD[name]
    made = trainer(tmp_path, data=Listed(item, item), data_collator=stack)
    before = [parameter.clone() for parameter in made.student.parameters()]
    with pytest.raises(InputError) as caught:
        made.train()
    assert str(caught.value).startswith("train_dataset, sample 0 of the first batch: ")
    assert all(part in str(caught.value) for part in expected)
    assert all(map(torch.equal, before, made.student.parameters()))
    with pytest.raises(InputError, match="eval_dataset, sample 0 of the first batch: "):
        trainer(tmp_path, data_collator=stack).evaluate(Listed(item))


def test_images_of_several_sizes_that_a_collator_cannot_stack(tmp_path: Path) -> None:
    items = [GOOD, {"pixel_values": PIXELS[:, :40], "labels": LABELS[:40]}]
    with pytest.raises(
        InputError, match=r"data_collator: .* got the shapes \[3, 40, 64\], \[3, 64, 64\]: .*resize or pad"
    ):
        trainer(tmp_path, data=Listed(*items), data_collator=stack).train()
    trainer(tmp_path, data=Listed(*items), max_steps=1).train()  # ours pads them


@pytest.mark.parametrize("once", [False, True])
def test_a_stream_loses_nothing(tmp_path: Path, once: bool) -> None:
    items = [Images(4)[index] for index in range(4)]
    stream, seen = Streamed(*items, once=once), []
    made = trainer(tmp_path, data=stream, max_steps=2, per_device_train_batch_size=2)
    compute = made.compute_loss
    made.compute_loss = lambda model, inputs, **kwargs: (
        seen.extend(inputs["pixel_values"]),
        compute(model, inputs, **kwargs),
    )[1]
    made.train()
    assert len(seen) == 4 and all(
        torch.equal(one, item["pixel_values"]) for one, item in zip(seen, items, strict=True)
    )


def test_no_random_number_is_drawn(tmp_path: Path) -> None:
    class Drawing(Images):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            random.random(), np.random.rand(), torch.rand(())
            return super().__getitem__(index)

    def states() -> list[Any]:
        return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]

    made, before = trainer(tmp_path, data=Drawing(4)), states()
    made._looked_at("eval_dataset", Drawing(4), True)
    assert states() == before


@pytest.mark.parametrize("role", ["train", "eval"])
def test_small_images_of_a_folder_are_named(tmp_path: Path, role: str) -> None:
    """The smallest image of a split is looked at, wherever it is; a crop that is too small is refused as well."""
    root = tmp_path / "set"
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        lines = []
        for index in range(12):
            small = (role == "train") == (split == "train") and index == 9
            size = (8, 64) if small else (64, 64)
            for kind, high in (("image", 255), ("mask", 4)):
                values = np.random.default_rng(index).integers(0, high, (*size, 3) if kind == "image" else size)
                Image.fromarray(values.astype(np.uint8)).save(root / split / f"{kind}{index}.png")
            lines.append(json.dumps({"file_name": f"image{index}.png", "mask_file_name": f"mask{index}.png"}))
        (root / split / "metadata.jsonl").write_text("\n".join(lines))
    config = DataConfig(path=str(root), num_labels=4, scale=[1, 1])
    data = load_segmentation(config)
    problem = said(tmp_path / "out", data=data.train, eval_dataset=data.eval)
    split = {"train": "train", "eval": "val"}[role]
    assert problem.startswith(f"{role}_dataset[9] ({split}/image9.png): ") and "got 8 x 64" in problem
    config.image_size = [16, 16]
    data = load_segmentation(config)
    assert "got 16 x 16" in said(tmp_path / "out", data=data.train)
    config.image_size, config.crop_size = [64, 64], [64, 64]
    data = load_segmentation(config)
    trainer(tmp_path / "out", data=data.train, eval_dataset=data.eval)


def test_a_small_batch_is_refused_wherever_it_comes(tmp_path: Path) -> None:
    small = {"pixel_values": PIXELS[:, :8], "labels": LABELS[:8]}
    made = trainer(tmp_path, data=Streamed(GOOD, small), max_steps=2, per_device_train_batch_size=1)
    with pytest.raises(InputError, match="train_dataset: pixel_values: expected images of at least 32 x 32"):
        made.train()


def test_strides_of_students() -> None:
    assert deepest_stride(student()) == 32
    small = SegformerConfig(hidden_sizes=[8] * 4, depths=[1] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8)
    assert deepest_stride(SegformerForSemanticSegmentation(small)) == 32
    for kind in ("retinanet", "conditional_detr"):
        assert deepest_stride(DetectionTask(NAMES).build_student(STUDENTS[kind])) == 32
    assert deepest_stride(torch.nn.Conv2d(3, 3, 1)) is None


BOXES = Boxed(1)[0]["labels"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"boxes": torch.tensor([[4.0, 6, 40, 30]])}, ("centre x, centre y", "divide pixels")),
        ({"boxes": torch.tensor([[0.5, 0.6, 0.9, 0.95]])}, ("centre x, centre y", "two corners")),
        ({"boxes": torch.tensor([[0.5, 0.5, float("nan"), 0.1]])}, ("centre x, centre y", "nan")),
        ({"boxes": torch.tensor([[0.5, 0.5, 0.0, 0.1]])}, ("without area",)),
        ({"boxes": torch.tensor([[-0.4, 0.5, 0.1, 0.1]])}, ("0..1 of the image", "-0.4")),
        ({"boxes": torch.zeros(1, 5)}, ("[n, 4]", "[1, 5]")),
        ({"boxes": [[0.5, 0.5, 0.1, 0.1]]}, ("[n, 4]",)),
        ({"class_labels": torch.tensor([3])}, ("0..2", "[3]")),
        ({"class_labels": torch.tensor([-1])}, ("0..2", "[-1]")),
        ({"class_labels": torch.tensor([1.0])}, ("int64", "float32")),
        ({"class_labels": torch.tensor([1, 2])}, ("one class for each box", "2 class_labels and 1 boxes")),
        ([], ("class_labels, boxes", "list")),
        ({"class_labels": None}, ("class ids [n] as int64", "None")),
    ],
)
def test_boxes_of_users(tmp_path: Path, change: Any, expected: tuple[str, ...]) -> None:
    good = Boxed(1)[0]
    item = {**good, "labels": {**BOXES, **change} if isinstance(change, dict) else change}
    task = DetectionTask(NAMES)
    model = task.build_student(STUDENTS["retinanet"])
    for settings in ({"data": Listed(good, item)}, {"data": Boxed(4), "eval_dataset": Listed(good, item)}):
        problem = said(tmp_path, model=model, task=task, **settings)
        place = "eval_dataset[1]: " if "eval_dataset" in settings else "train_dataset[1]: "
        assert problem.startswith(place) and all(part in problem for part in expected), problem
    made = trainer(tmp_path, Boxed(2), model=model, task=task, eval_dataset=Boxed(2))
    assert made.first.stride == 32
