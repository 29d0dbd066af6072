"""Converted models against MMDetection itself, run in an environment of its own (see `upstream.py`)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from cankd_hf.convert.command import convert
from cankd_hf.convert.reading import read_checkpoint

PYTHON = os.environ.get("CANKD_UPSTREAM", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not PYTHON, reason="CANKD_UPSTREAM names no Python with mmdet 3.3"),
]


def upstream(tmp_path: Path, kind: str, config: str, *changes: str) -> tuple[Any, dict[str, Any]]:
    """Our model and what theirs was given and gave."""
    out = tmp_path / "out.pt"
    subprocess.run([PYTHON, str(Path(__file__).parent / "upstream.py"), config, str(out), *changes], check=True)
    model, plan = convert(read_checkpoint(Path(f"{out}.pth"), "student"), kind, "auto", None)
    seen = torch.load(out, weights_only=True)
    mean, std = (torch.tensor(x)[:, None, None] for x in plan.pixels)
    seen["pixels"] = [(image.flip(0).float() - mean) / std for image in seen["images"]]
    return model, seen


def shown(seen: dict[str, Any]) -> torch.Tensor:
    """Where the batch shows its images, which are normalised by the converted folder's statistics."""
    mask = torch.zeros(len(seen["inputs"]), *seen["inputs"].shape[-2:])
    for place, image in enumerate(seen["pixels"]):
        height, width = image.shape[-2:]
        mask[place, :height, :width] = 1
        torch.testing.assert_close(seen["inputs"][place, :, :height, :width], image)
    return mask


SWIN = ("embed_dims=32", "depths=[1, 1, 2, 1]", "num_heads=[1, 2, 4, 8]", "window_size=7")
THIN = ("model.neck.in_channels=[32, 64, 128, 256]", "model.encoder.num_layers=1", "model.decoder.num_layers=2")


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ("4scale_r50_8xb2-12e", ("model.num_queries=300",)),
        ("4scale_r50_improved_8xb2-12e", ("model.num_queries=100", *THIN[1:])),
        ("5scale_swin-l_8xb2-12e", ("model.num_queries=100", *THIN, *(f"model.backbone.{one}" for one in SWIN))),
    ],
)
def test_dino(config: str, changes: tuple[str, ...], tmp_path: Path) -> None:
    model, seen = upstream(tmp_path, "dino", f"dino/dino-{config}_coco.py", *changes)
    with torch.no_grad():
        output = model(seen["inputs"], pixel_mask=shown(seen))
    torch.testing.assert_close(output.encoder_last_hidden_state, seen["memory"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.logits, seen["logits"], rtol=1e-4, atol=1e-4)
    boxes = output.intermediate_reference_points.transpose(0, 1)
    torch.testing.assert_close(boxes, seen["boxes"], rtol=1e-4, atol=1e-5)
    assert seen["boxes"].std() > 0.1


@pytest.mark.parametrize(
    ("kind", "config", "stages"),
    [
        ("faster_rcnn", "mask_rcnn/mask-rcnn_r50_fpn_2x_coco.py", [""]),
        ("cascade_rcnn", "cascade_rcnn/cascade-mask-rcnn_r50_fpn_20e_coco.py", [".0", ".1", ".2"]),
    ],
)
def test_masks(kind: str, config: str, stages: list[str], tmp_path: Path) -> None:
    heads = [*(f"bbox_head{stage}" for stage in stages), "mask_head"]
    few = [f"model.roi_head.{head}.num_classes=5" for head in heads]  # of random weights, above the threshold
    model, seen = upstream(tmp_path, kind, config, *few)
    sizes = [tuple(image.shape[-2:]) for image in seen["images"]]
    with torch.no_grad():
        output = model(seen["inputs"], pixel_mask=shown(seen), output_hidden_states=True)
    for ours, theirs in zip(output.hidden_states, seen["maps"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    everything = model.post_process_instance_segmentation(output, 0.0, sizes, shown(seen))
    for found, wanted in zip(everything, seen["found"], strict=True):
        assert len(wanted["scores"]) == len(found["scores"]) > 5
        torch.testing.assert_close(found["scores"], wanted["scores"], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found["boxes"], wanted["bboxes"], rtol=1e-3, atol=1e-2)
        assert found["labels"].tolist() == wanted["labels"].tolist()
    logits = [seen[f"roi_head.mask_head{stage}.conv_logits"] for stage in stages]
    rated = torch.stack([x.sigmoid() for x in logits]).mean(0)
    labels = torch.cat([one["labels"] for one in seen["found"]])
    counts = [len(one["labels"]) for one in seen["found"]]
    own = rated[torch.arange(len(labels)), labels].split(counts)
    for ours, theirs, count in zip(output.pred_masks, own, counts, strict=True):
        torch.testing.assert_close(ours[:count].sigmoid(), theirs, rtol=1e-3, atol=1e-4)
        assert theirs.std() > 0.03
