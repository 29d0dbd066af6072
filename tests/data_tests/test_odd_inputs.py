"""Every image, segmentation and folder case of the odd inputs ends as its manifest allows, strict or skipping."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.sources import TaskData
from cankd_hf.data.features.load import load_images
from cankd_hf.data.segmentation.load import load_segmentation
from cankd_hf.errors import InputError

SHARED = Path(os.environ.get("CANKD_SHARED", Path(__file__).resolve().parents[2].parent / "shared"))
ODD = SHARED / "data" / "odd_inputs"
MANIFEST = ODD / "manifest.json"
KINDS = ("image", "segmentation set", "folder")


def cases() -> list[dict[str, Any]]:
    if not MANIFEST.is_file():
        return []
    content = json.loads(MANIFEST.read_text(encoding="utf-8"))
    entries = content["cases"] if isinstance(content, dict) else content
    return [entry for entry in entries if entry["kind"] in KINDS]


pytestmark = pytest.mark.skipif(not MANIFEST.is_file(), reason=f"no odd inputs at {ODD}; set CANKD_SHARED")


def run(data: TaskData) -> None:
    """Go through all items as training and evaluation do."""
    for split in (data.train, data.eval):
        batch = data.collate([split[index] for index in range(len(split))])
        assert batch["pixel_values"].isfinite().all()


def outcomes(load: Any, config: DataConfig) -> tuple[set[str], str]:
    """What our loading did with a set, in the manifest's words, and all it said."""
    try:
        data = load(config)
    except InputError as error:
        return {"reject"}, str(error)
    run(data)
    facts = data.facts
    if facts["skipped"]["count"]:
        return {"skip"}, json.dumps(facts["skipped"]["files"])
    if facts["warnings"]:
        return {"warn", "accept"}, "\n".join(facts["warnings"])
    return {"accept", "convert"}, ""


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize("case", cases(), ids=lambda case: case["id"])
def test_odd_input_ends_as_allowed(case: dict[str, Any], on_error: str, tmp_path: Path) -> None:
    config = DataConfig(crop_size=[48, 64], image_size=[60, 80], on_error=on_error)
    if case["kind"] == "image":
        bad = Path(case["path"]).name
        for split, good in (("train", "reference/scene.jpg"), ("val", "images/png_named.jpg")):
            (tmp_path / split).mkdir()
            shutil.copy(ODD / good, tmp_path / split / "good.jpg")
        shutil.copy(ODD / case["path"], tmp_path / "train" / bad)
        config.path = str(tmp_path)
        found, said = outcomes(load_images, config)
    else:
        config.path = str(ODD / case["path"])
        bad = Path(case.get("bad_file", "")).name
        found, said = outcomes(load_segmentation, config)
    assert found & set(case["allowed_outcomes"]), f"{found}: {said}"
    if found & {"reject", "skip"}:
        assert bad in said
    if on_error == "skip" and "skip" in case["allowed_outcomes"] and found == {"reject"}:
        pytest.fail(f"asked to skip, but it stopped: {said}")


SCENE_LIKE = ["gray16.png", "gray.jpg", "rgba.png", "palette_transparent.png", "exif_rot6.jpg", "png_named.jpg"]


@pytest.mark.parametrize("name", SCENE_LIKE)
def test_conversion_is_right(name: str, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / name).write_bytes((ODD / "images" / name).read_bytes())
    shutil.copy(ODD / "reference" / "scene.jpg", tmp_path / "train" / "z.jpg")
    data = load_images(DataConfig(path=str(tmp_path), holdout=0.5))
    image, scene = data.eval.raw(0).image.float(), data.train.raw(0).image.float()
    assert image.dtype == torch.float32 and image.shape[0] == 3
    if image.shape == scene.shape:
        assert (image.mean(0) - scene.mean(0)).abs().mean() < 6  # same place, same brightness
    assert abs(image.mean() - scene.mean()) < 3


def test_gif_gives_its_first_frame(tmp_path: Path) -> None:
    for name in ("animated.gif", "constant_black.jpg"):
        shutil.copy(ODD / "images" / name, tmp_path / name)
    data = load_images(DataConfig(path=str(tmp_path), holdout=0.5))
    assert data.eval.raw(0).image.shape == (3, 120, 160)


def test_rgb_masks_are_mapped_by_the_palette() -> None:
    data = load_segmentation(DataConfig(path=str(ODD / "seg" / "rgb_mask")))
    names = [data.train.source.name(index) for index in data.train.indices]
    mask = data.train.raw([index for index, name in enumerate(names) if "bad" in name][0]).label
    assert set(mask.unique().tolist()) <= {*range(11), 255} and len(mask.unique()) > 4


def test_palette_masks_keep_their_indices() -> None:
    data = load_segmentation(DataConfig(path=str(ODD / "seg" / "mask_palette")))
    assert set(data.train.raw(3).label.unique().tolist()) == {*range(11), 255}


def test_the_mask_first_in_metadata_is_still_the_mask() -> None:
    data = load_segmentation(DataConfig(path=str(ODD / "seg" / "mask_key_first")))
    assert data.train.raw(0).name.endswith("good0.jpg") and set(data.train.raw(0).label.unique().tolist()) <= {
        *range(11),
        255,
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named_out_of_a_loading_process(workers: int) -> None:
    config = DataConfig(path=str(ODD / "folders" / "broken_image"), check="none", crop_size=[32, 32])
    data = load_segmentation(config)
    loader = torch.utils.data.DataLoader(data.train, batch_size=3, num_workers=workers, collate_fn=data.collate)
    with pytest.raises(InputError, match=r"train/broken.jpg: expected an image that decodes"):
        list(loader)
    config.on_error = "skip"
    data = load_segmentation(config)
    loader = torch.utils.data.DataLoader(data.train, batch_size=3, num_workers=workers, collate_fn=data.collate)
    (batch,) = list(loader)
    assert (batch["labels"][1] == 255).all() and (batch["labels"][0] != 255).any()


def test_skipping_counts_and_names() -> None:
    config = DataConfig(path=str(ODD / "folders" / "broken_image"), on_error="skip")
    facts = load_segmentation(config).facts
    assert facts["skipped"]["count"] == 1 and list(facts["skipped"]["files"]) == ["train/broken.jpg"]
    assert facts["splits"] == {"train": 2, "eval": 1} and facts["checked"] == 4
