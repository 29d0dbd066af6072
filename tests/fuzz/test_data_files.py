"""Whatever metadata.jsonl, labels.json or a COCO json holds: data, or messages with places. See `cases` for counts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cankd_hf.config.data import DataConfig
from cankd_hf.tasks import TASKS

from .cases import JSON_EDITS, JSON_VALUES, changed, edited, edits, result_or_input_error, within

LABELS = {"id2label": {"0": "ground", "1": "thing"}, "palette": {"0": [0, 0, 0], "1": [9, 9, 9]}, "ignore_index": 255}
MASKED = [{"file_name": f"{n}.png", "mask_file_name": f"masks/{n}.png"} for n in range(2)]
BOXED = [{"file_name": f"{n}.png", "objects": {"bbox": [[4, 4, 9, 9]], "category": [n]}} for n in range(2)]
COCO = {
    "images": [{"id": n, "file_name": f"{n}.png", "width": 40, "height": 40} for n in range(2)],
    "annotations": [
        {"id": n, "image_id": n, "category_id": 1 + 4 * n, "bbox": [4, 4, 9, 9], "area": 81, "iscrowd": 0}
        for n in range(2)
    ],
    "categories": [{"id": 1, "name": "one"}, {"id": 5, "name": "five"}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images with masks in train/, beside files that must not be read as images."""
    root = tmp_path_factory.mktemp("set")
    train = root / "train"
    (train / "masks").mkdir(parents=True)
    (root / "annotations").mkdir()
    random = np.random.default_rng(0)
    for n in range(2):
        Image.fromarray(random.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(train / f"{n}.png")
        Image.fromarray(random.integers(0, 2, (40, 40), dtype=np.uint8)).save(train / "masks" / f"{n}.png")
    os.mkfifo(train / "pipe")
    outside = tmp_path_factory.mktemp("outside") / "x.png"
    Image.new("RGB", (40, 40)).save(outside)
    (train / "link.png").symlink_to(outside)
    return root


def opened(root: Path, task: str, **settings: Any) -> Any:
    """Opens the set and takes its first image, as a run does."""
    config = DataConfig(path=str(root), eval_split=None, crop_size=[32, 32], **settings)
    data = TASKS[task].from_data(config)[1]
    return data.train[0]


def written(root: Path, labels: str | None, metadata: str | None, coco: str | None = None) -> None:
    """Puts the annotations of a case into the folder."""
    for file, text in {
        root / "labels.json": labels,
        root / "train" / "metadata.jsonl": metadata,
        root / "annotations" / "instances_train.json": coco,
    }.items():
        if text is None:
            file.unlink(missing_ok=True)
        else:
            file.write_bytes(text.encode("utf-8", "surrogatepass"))


def as_lines(entries: Any) -> str:
    return "\n".join(json.dumps(entry) for entry in (entries if isinstance(entries, list) else [entries]))


def copied(content: Any) -> Any:
    return json.loads(json.dumps(content))


settings_of_sets = st.fixed_dictionaries(
    {},
    optional={
        "on_error": st.sampled_from(["stop", "skip"]),
        "reduce_labels": st.booleans(),
        "num_labels": st.integers(1, 3),
        "ignore_index": st.sampled_from([0, 1, 255, -100]),
        "max_train_samples": st.integers(1, 2),
    },
)


@within(60)
@given(JSON_EDITS, settings_of_sets)
def test_metadata_of_masks(folder: Path, changes: Any, given_settings: dict[str, Any]) -> None:
    written(folder, json.dumps(LABELS), as_lines(changed(copied(MASKED), changes)))
    result_or_input_error(lambda: opened(folder, "segmentation", **given_settings))


@within(60)
@given(JSON_EDITS, settings_of_sets)
def test_metadata_of_boxes(folder: Path, changes: Any, given_settings: dict[str, Any]) -> None:
    written(folder, json.dumps(LABELS), as_lines(changed(copied(BOXED), changes)))
    result_or_input_error(lambda: opened(folder, "detection", **given_settings))


@within(60)
@given(JSON_EDITS, st.sampled_from(["segmentation", "detection"]), settings_of_sets)
def test_labels(folder: Path, changes: Any, task: str, given_settings: dict[str, Any]) -> None:
    written(
        folder, json.dumps(changed(copied(LABELS), changes)), as_lines(MASKED if task == "segmentation" else BOXED)
    )
    result_or_input_error(lambda: opened(folder, task, **given_settings))


@within(60)
@given(JSON_EDITS, settings_of_sets)
def test_coco(folder: Path, changes: Any, given_settings: dict[str, Any]) -> None:
    written(folder, json.dumps(LABELS), None, json.dumps(changed(copied(COCO), changes)))
    (folder / "labels.json").unlink()
    result_or_input_error(lambda: opened(folder, "detection", **given_settings))


@within(40)
@given(st.sampled_from(["labels", "metadata", "coco"]), edits, st.text(max_size=10) | JSON_VALUES.map(json.dumps))
def test_text_that_is_no_json(folder: Path, which: str, changes: Any, other: str) -> None:
    texts = {"labels": json.dumps(LABELS, indent=1), "metadata": as_lines(BOXED), "coco": None}
    if which == "coco":
        texts = {"labels": None, "metadata": None, "coco": json.dumps(COCO, indent=1)}  # type: ignore[dict-item]
    texts[which] = edited(texts[which], changes) if len(changes) > 1 else other
    written(folder, **texts)
    result_or_input_error(lambda: opened(folder, "detection"))
