"""Every detection case of the odd inputs ends as its manifest allows, strict or skipping, naming file and box."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cankd_hf.config.data import DataConfig
from cankd_hf.data.detection.load import DetectionData, load_detection
from cankd_hf.errors import InputError

SHARED = Path(os.environ.get("CANKD_SHARED", Path(__file__).resolve().parents[2].parent / "shared"))
ODD = SHARED / "data" / "odd_inputs"
MANIFEST = ODD / "manifest.json"
COCO = "annotations/instances_{split}.json"
COCO_ONLY = {"duplicate_annotation_ids", "annotation_unknown_image", "crowd_annotation"}
NO_BOX_TO_NAME = {"size_in_metadata_wrong", "image_without_boxes"}

pytestmark = pytest.mark.skipif(not MANIFEST.is_file(), reason=f"no odd inputs at {ODD}; set CANKD_SHARED")


def cases() -> list[Any]:
    """(case, way the boxes are written), without the pairs in which nothing is wrong."""
    entries = json.loads(MANIFEST.read_text(encoding="utf-8")) if MANIFEST.is_file() else []
    entries = entries["cases"] if isinstance(entries, dict) else entries
    return [
        pytest.param(case, annotations, id=f"{case['id']}-{'coco' if annotations == COCO else 'metadata'}")
        for case in entries
        if case["kind"] == "detection set"
        for annotations in ("auto", COCO)
        if annotations == COCO or case["id"] not in COCO_ONLY
    ]


def run(data: DetectionData) -> None:
    """Go through all items as training and evaluation do."""
    for split in (data.train, data.eval):
        batch = data.collate([split[index] for index in range(len(split))])
        assert batch["pixel_values"].isfinite().all()
        for labels in batch["labels"]:
            boxes, classes = labels["boxes"], labels["class_labels"]
            assert boxes.shape == (len(classes), 4) and boxes.isfinite().all()
            assert (boxes[:, 2:] > 0).all() and (boxes >= 0).all() and (boxes <= 1).all()
            assert ((classes >= 0) & (classes < len(data.id2label))).all()


def outcomes(config: DataConfig) -> tuple[set[str], str]:
    """What our loading did with a set, in the manifest's words, and all it said."""
    try:
        data = load_detection(config)
    except InputError as error:
        return {"reject"}, str(error)
    run(data)
    left_out = {"files": data.facts["skipped"]["files"], "boxes": data.facts.get("dropped_boxes")}
    said = json.dumps(left_out) + "\n".join(data.facts["warnings"])
    if any(left_out.values()):
        return {"skip"}, said
    return {"warn", "accept"} if data.facts["warnings"] else {"accept"}, said


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize(("case", "annotations"), cases())
def test_odd_input_ends_as_allowed(case: dict[str, Any], annotations: str, on_error: str) -> None:
    config = DataConfig(
        path=str(ODD / case["path"]), annotations=annotations, image_size=[60, 80], scale=[1.0, 1.0], on_error=on_error
    )
    found, said = outcomes(config)
    allowed = set(case["allowed_outcomes"])
    assert found & allowed, f"{found}: {said}"
    if "accept" not in allowed:
        assert case.get("bad_file", COCO.format(split="train")) in said
        assert case["id"] in NO_BOX_TO_NAME | COCO_ONLY or "box 0" in said
    if on_error == "skip" and "skip" in allowed:
        assert found == {"skip"}


def test_a_box_is_left_out_and_its_image_stays() -> None:
    data = load_detection(DataConfig(path=str(ODD / "det" / "box_nan"), on_error="skip"))
    assert data.facts["splits"]["train"] == 4 and data.facts["skipped"]["count"] == 0
    assert data.facts["dropped_boxes"]["count"] == 1 and list(data.facts["dropped_boxes"]["files"]) == [
        "train/bad.jpg"
    ]
    places = [index for index in range(4) if data.train.raw(index).name == "train/bad.jpg"]
    written = json.loads((ODD / "det" / "box_nan" / "train" / "metadata.jsonl").read_text().splitlines()[-1])
    assert len(data.train.raw(places[0]).label.boxes) == len(written["objects"]["bbox"]) - 1


def test_a_crowd_is_no_target_but_stays_for_the_score() -> None:
    config = DataConfig(path=str(ODD / "det" / "crowd_rle"), annotations=COCO, eval_split="train", scale=[1.0, 1.0])
    data = load_detection(config)
    crowds = [data.eval[index]["labels"]["iscrowd"].sum().item() for index in range(4)]
    assert crowds[0] == 1 and sum(crowds) == 1
    learnt, scored = data.train[0]["labels"], data.eval[0]["labels"]
    assert len(learnt["boxes"]) == len(scored["boxes"]) - 1 and not learnt["iscrowd"].any()
