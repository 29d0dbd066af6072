"""`cankd convert`: the folder it writes, distillers' files, and what it refuses, each in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForInstanceSegmentation

from cankd_hf import convert
from cankd_hf.config.teacher import TeacherConfig
from cankd_hf.convert.reading import read_checkpoint
from cankd_hf.features.inputs import image_stats
from cankd_hf.models.fpn.modeling_cankd_fpn_detection import FPNForObjectDetection
from cankd_hf.teachers.load import load_teacher

from .openmmlab import State, saved
from .test_detectors import fcos, mask_heads, retinanet, two_stage

BGR = """model = dict(
    data_preprocessor=dict(type='DetDataPreprocessor', mean=[102.9801, 115.9465, 122.7717], std=[1.0, 1.0, 1.0],
        bgr_to_rgb=False, pad_size_divisor=32),
    backbone=dict(type='ResNet', style='caffe', init_cfg=dict(checkpoint='x')))
open('/nowhere', 'w')
"""


def run(file: Path, kind: str, out: Path, *more: str) -> int:
    return convert.main([str(file), "--as", kind, str(out), *more])


def distilled(state: State) -> State:
    """As the authors' toolbox saves it: student, teacher and distiller with the CanKD block."""
    student = {f"architecture.{name}": value for name, value in state.items()}
    block = {f"distiller.distill_losses.loss_fpn0.non_local_att.{x}.weight": torch.ones(2) for x in ("g", "W.0")}
    return student | block | {"teacher.backbone.conv1.weight": torch.ones(2), "distiller.connectors.a": torch.ones(2)}


def test_folder(tmp_path: Path, capsys: Any) -> None:
    state = retinanet()
    out = tmp_path / "new" / "folder"
    file = saved(tmp_path / "epoch_24.pth", distilled(state), cfg=BGR, dataset_meta={"classes": ("a", "b", "c")})
    assert run(file, "retinanet", out) == 0
    said = capsys.readouterr().out
    for words in ("caffe style (as the file's own", "BGR", "left out, the CanKD block: 2", "left out, the teacher: 1"):
        assert words in said, said
    model = FPNForObjectDetection.from_pretrained(out)
    first = model.backbone.embedder.embedder.convolution.weight
    assert torch.equal(first, state["backbone.conv1.weight"].flip(1))
    assert model.config.conventions == "openmmlab" and model.config.backbone_config.downsample_in_bottleneck
    stats = image_stats(str(out))
    assert stats.mean == pytest.approx([x / 255 for x in (122.7717, 115.9465, 102.9801)])
    assert stats.std == pytest.approx([1 / 255] * 3)
    assert AutoImageProcessor.from_pretrained(out).size["shortest_edge"] == 800
    record = json.loads((out / "conversion.json").read_text())
    assert record["as"] == "retinanet" and len(record["sha256"]) == 64
    images = torch.randn(1, 3, 64, 64)
    model.train()
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.5, 0.5]])}]
    assert torch.isfinite(model(pixel_values=images, labels=labels).loss)
    assert run(file, "retinanet", out) == 2 and "new or empty folder" in capsys.readouterr().err


def test_labels_of_a_file(tmp_path: Path, capsys: Any) -> None:
    file = saved(tmp_path / "m.pth", two_stage(["roi_head.bbox_head"], False))
    names = tmp_path / "labels.json"
    names.write_text('{"id2label": {"0": "x", "1": "y", "2": "z"}}')
    assert run(file, "faster_rcnn", tmp_path / "a", "--style", "pytorch", "--labels", str(names)) == 0
    assert FPNForObjectDetection.from_pretrained(tmp_path / "a").config.id2label == {0: "x", 1: "y", 2: "z"}
    names.write_text("[1]")
    assert run(file, "faster_rcnn", tmp_path / "b", "--style", "pytorch", "--labels", str(names)) == 2
    assert "expected 3 class names" in capsys.readouterr().err and not (tmp_path / "b").exists()


def test_folder_with_masks(tmp_path: Path, capsys: Any) -> None:
    """Cascade Mask R-CNN as a folder: it finds masks, and is a teacher whose maps any student learns from."""
    heads = [f"roi_head.bbox_head.{i}" for i in range(3)]
    state = two_stage(heads, True) | mask_heads([head.replace("bbox", "mask") for head in heads])
    out = tmp_path / "cascade"
    assert run(saved(tmp_path / "m.pth", state), "cascade_rcnn", out, "--style", "pytorch") == 0
    assert "masks: taken" in capsys.readouterr().out
    model = AutoModelForInstanceSegmentation.from_pretrained(out).eval()
    assert len(model.head.mask_branches) == 3
    assert type(AutoImageProcessor.from_pretrained(out)).__name__ == "DeformableDetrImageProcessor"
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    maps = load_teacher(TeacherConfig(model=str(out)))(images)
    with torch.no_grad():
        own = model(pixel_values=images, output_hidden_states=True).hidden_states
    assert len(list(maps)) == len(own) == 5
    for one, other in zip(maps, own, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


class Code:
    """What weights_only refuses."""

    def __reduce__(self) -> Any:
        return (print, ("run",))


def test_refused(tmp_path: Path, capsys: Any) -> None:
    state = retinanet()
    extra, less = state | {"bbox_head.surprise": torch.ones(1)}, dict(state)
    del less["neck.fpn_convs.1.conv.bias"]
    wide = state | {"bbox_head.reg_convs.1.conv.weight": torch.ones(16, 16, 1, 1)}
    dcn = state | {"backbone.layer2.0.conv2.conv_offset.weight": torch.ones(27, 12, 3, 3)}
    swin = {"backbone.patch_embed.projection.weight": torch.ones(1)}
    other = {key.replace("retina_cls", "atss_cls"): value for key, value in state.items()}
    cases = {
        "1 tensors are unknown: bbox_head.surprise": ("retinanet", extra, "pytorch"),
        "1 tensors are missing: neck.fpn_convs.1.conv.bias": ("retinanet", less, "pytorch"),
        "of another shape: bbox_head.reg_convs.1.conv.weight (16, 16, 1, 1), expected": ("retinanet", wide, "pytorch"),
        "give --style caffe": ("retinanet", state, "auto"),
        "expected plain deformable convolutions": ("retinanet", dcn, "pytorch"),
        "expected a neck of 3 levels": ("retinanet", swin, "pytorch"),
        "expected a tensor bbox_head.retina_cls.weight": ("retinanet", other, "pytorch"),
        "expected a tensor rpn_head.rpn_cls.weight": ("faster_rcnn", two_stage([], False) | {}, "pytorch"),
        "in 16 groups, got 32": ("fcos", fcos([1.0] * 5, 64), "pytorch"),
        "expected a tensor level_embed": ("dino", state, "pytorch"),
    }
    cases["expected a tensor rpn_head.rpn_cls.weight"][1].pop("rpn_head.rpn_cls.weight")
    for said, (kind, content, style) in cases.items():
        file = saved(tmp_path / "m.pth", content)
        assert run(file, kind, tmp_path / "out", "--style", style) == 2, said
        lines = capsys.readouterr().err.splitlines()
        assert said in lines[0] and "Traceback" not in "".join(lines), lines
        assert not (tmp_path / "out").exists()


def test_unreadable(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "m.pth"
    torch.save({"state_dict": {}, "message_hub": Code()}, file)
    assert run(file, "fcos", tmp_path / "out") == 2
    assert "no code from it is run" in capsys.readouterr().err
    for content, said in ((b"", "cannot be read"), (3, "expected a state_dict"), (None, "found none")):
        if content == 3:
            torch.save(content, file)
        elif content is None:
            file.unlink()
        else:
            file.write_bytes(b"")
        assert run(file, "fcos", tmp_path / "out") == 2
        assert said in (errors := capsys.readouterr().err), errors


def test_part(tmp_path: Path) -> None:
    state = {"student.a": torch.ones(1), "teacher.a": torch.zeros(1), "module.distiller.x": torch.ones(1)}
    file = saved(tmp_path / "m.pth", state)
    for part, value in (("student", 1.0), ("teacher", 0.0)):
        made = read_checkpoint(file, part)
        assert list(made.state) == ["a"] and made.state["a"].item() == value
        assert sum(map(len, made.left_out.values())) == 2
