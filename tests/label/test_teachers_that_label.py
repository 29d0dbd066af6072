"""Every kind of teacher with a head labels: models of transformers, of torchvision; and two processes as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import get_model
from transformers import (
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    UperNetConfig,
)

from cankd_hf import label
from cankd_hf.models.configs import config_from_dict
from cankd_hf.models.torchvision_heads import TorchvisionHead
from tests.label.conftest import NAMES, save_images
from tests.processes import run_two
from tests.training.native_detector_configs import PYRAMID, config

SEGFORMER = {"hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 2]}


def labelled(teacher: Path | str, tmp_path: Path, *words: str) -> list[dict[str, Any]]:
    photos, out = save_images(tmp_path / "photos", 3), tmp_path / "out"
    assert label.main([str(teacher), str(photos), "--output", str(out), "--sheet", "1", *words]) == 0
    return [json.loads(line) for line in (out / "train/metadata.jsonl").read_text().splitlines()]


def test_segformer_labels_at_the_size_of_its_processor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SegformerForSemanticSegmentation(SegformerConfig(**SEGFORMER, decoder_hidden_size=16, id2label=NAMES))
    model.save_pretrained(tmp_path / "teacher")
    processor = {"size": {"height": 96, "width": 128}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "teacher/preprocessor_config.json").write_text(json.dumps(processor))
    assert all("mask_file_name" in line for line in labelled(tmp_path / "teacher", tmp_path))
    teacher = json.loads((tmp_path / "out/label.json").read_text())["teacher"]
    assert teacher["image_size"] == [96, 128] and teacher["image_mean"] == [0.5] * 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["detr", "rt_detr", "deformable_detr", "yolos", "upernet"])
def test_models_of_transformers_label(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if kind == "upernet":
        backbone = config_from_dict({**PYRAMID, "out_features": ["stage1", "stage2", "stage3", "stage4"]}, "backbone")
        made = UperNetConfig(backbone_config=backbone, hidden_size=16, auxiliary_channels=8, id2label=NAMES)
        made.auxiliary_in_channels = 16
        model = AutoModelForSemanticSegmentation.from_config(made)
    else:
        made = config_from_dict({**config(kind), "id2label": dict(NAMES)}, "teacher")
        model = AutoModelForObjectDetection.from_config(made)
    model.save_pretrained(tmp_path / "teacher")
    lines = labelled(tmp_path / "teacher", tmp_path, "--threshold", "0.01")
    boxes = [box for line in lines for box in (line.get("objects") or {}).get("bbox", [])]
    assert kind == "upernet" or boxes
    assert all(x + w <= 96.01 and y + h <= 64.01 for x, y, w, h in boxes)


class Finder(nn.Module):
    """A detector as torchvision has them: it finds one box of class 2 in each image, and one of no class of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.transform = nn.Identity()

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        height, width = images[0].shape[-2:]
        box = torch.tensor([[0.0, 0.0, width / 2, height / 4], [0.0, 0.0, 1.0, 1.0]])
        return [{"boxes": box, "labels": torch.tensor([2, 0]), "scores": torch.tensor([0.75, 0.9])} for _ in images]


def test_detections_of_torchvision_become_logits_and_boxes() -> None:
    head = TorchvisionHead(Finder(), ["a", "b"], [1, 2], "TorchvisionForObjectDetection")
    outputs = head(torch.zeros(2, 3, 64, 96))
    assert torch.allclose(outputs["logits"].sigmoid()[:, 0], torch.tensor([0.0, 0.75]))
    assert outputs["logits"][:, 1:].isneginf().all()
    assert outputs["pred_boxes"][0, 0].tolist() == [0.25, 0.125, 0.5, 0.25]


def test_a_segmentation_model_of_torchvision_labels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_model("lraspp_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=3)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    name = "torchvision/lraspp_mobilenet_v3_large"
    lines = labelled(name, tmp_path, "--weights", str(tmp_path / "weights.pth"), "--size", "64", "96")
    assert len(lines) == 3
    assert json.loads((tmp_path / "out/labels.json").read_text())["id2label"]["2"] == "class_2"


@pytest.mark.slow
def test_two_processes_write_what_one_writes(segmenter: Path, tmp_path: Path) -> None:
    photos = save_images(tmp_path / "photos", 7)
    words = [str(segmenter), str(photos), "--sheet", "1", "--batch-size", "2", "--threshold", "0.6"]
    assert label.main([*words, "--output", str(tmp_path / "one")]) == 0
    run_two("-m", "cankd_hf.label", *words, "--output", tmp_path / "two")
    files = ["train/metadata.jsonl", "labels.json", *(f"train/masks/{number}.png" for number in range(7))]
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)
    assert json.loads((tmp_path / "two/label.json").read_text())["processes"] == 2
