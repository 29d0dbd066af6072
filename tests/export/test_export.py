"""Exported students give what PyTorch gives, run without it, and say what they cannot do."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.layers import create_conv2d, padding
from torch import nn
from torch.export import Dim
from transformers import AutoModelForSemanticSegmentation, PreTrainedModel

from cankd_hf.errors import InputError
from cankd_hf.export import checks, main
from cankd_hf.export.compare import compare
from cankd_hf.export.patches import same_padding, traceable
from cankd_hf.export.source import Source, load
from cankd_hf.models.backbones import load_backbone
from cankd_hf.models.plain_detectors import suppress
from cankd_hf.models.students import StudentConfig, build_student
from cankd_hf.tasks.export_forms import in_order

from ..models.detectors import DETECTORS, detector
from ..models.kinds import KINDS, NAMES, RESNET, student
from ..models.test_dino import dino

onnxruntime = pytest.importorskip("onnxruntime")
SIZE = ["--size", "160", "192", "--no-latency"]  # no level of a pyramid has but one cell
# Kinds whose file takes one size in either format, and in one of them.
ONE_SIZE = {"swin_fpn", "timm_psp", "rt_detr", "dino"}
SAME = {"model_type": "timm_backbone", "backbone": "tf_efficientnet_lite0", "out_indices": [1, 2, 3, 4]}
BIT = {"model_type": "bit", "embedding_size": 8, "hidden_sizes": [32, 32, 64, 64], "depths": [1] * 4}
BIT |= {"num_groups": 8, "global_padding": "SAME"}
ONE_SIZE_IN = {"onnx": {"upernet"}, "torch-export": {"timm_aspp"}}


def talkative(kind: str) -> PreTrainedModel:
    """A detector that finds something in noise."""
    model = detector(kind, score_threshold=0.06, topk_candidates=100, max_detections=30).eval()
    for name, parameter in model.head.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2 if "cls" in name else 0.05)
        elif "cls" in name and "bias" in name:
            nn.init.constant_(parameter, -1.0)
    return model


def saved(model: PreTrainedModel, folder: Path) -> Path:
    """The folder of a student, its preprocessor's statistics beside it."""
    model.eval().save_pretrained(folder)
    stats = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2], "size": {"height": 96, "width": 128}}
    (folder / "preprocessor_config.json").write_text(json.dumps(stats), encoding="utf-8")
    return folder


def test_detectors_are_loaded_as_their_task_does(tmp_path: Path) -> None:
    source = load(str(saved(talkative("fcos_resnet"), tmp_path / "s")))
    assert source.task == "detection" and source.classes == list(NAMES.values())
    (tmp_path / "s" / "config.json").write_text(
        json.dumps({"model_type": "grounding-dino", "architectures": ["GroundingDinoForObjectDetection"]})
    )
    with pytest.raises(InputError, match="reads a text with each image"):
        load(str(tmp_path / "s"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A segmentation student, its ONNX folder, and what the command printed."""
    import contextlib
    import io

    torch.manual_seed(0)
    folder = saved(student("resnet_fpn"), tmp_path_factory.mktemp("student"))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main([str(folder), "--runs", "2"]) == 0
    return folder, folder / "onnx", printed.getvalue()


# The command says so, and writes a file of one size.
any_size = pytest.mark.skipif(
    torch.__version__.startswith("2.10."), reason="torch.export of 2.10 keeps the size fixed"
)


@any_size
def test_onnx_runs_at_other_batches_and_sizes(exported: tuple[Path, Path, str]) -> None:
    folder, out, _ = exported
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    model = load(str(folder)).model
    for shape in ((4, 3, 64, 64), (1, 3, 101, 75)):
        images = torch.randn(shape)
        with torch.no_grad():
            wanted = model(images).logits.numpy()
        np.testing.assert_allclose(session.run(None, {"pixel_values": images.numpy()})[0], wanted, atol=1e-4)
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == ["sky", "road", "car"] and json.loads(facts["image_mean"]) == [
        0.5,
        0.4,
        0.3,
    ]
    assert facts["checkpoint"] == folder.name


@any_size
def test_the_report_holds_what_is_printed(exported: tuple[Path, Path, str]) -> None:
    folder, out, printed = exported
    report = json.loads((out / "export.json").read_text(encoding="utf-8"))
    assert report["dynamic"] == ["batch", "height", "width"] and report["fixed_because"] is None
    assert all(check["passed"] and check["difference"] <= 1e-4 for check in report["checks"])
    sizes = {tuple(check["shape"]) for check in report["checks"]}
    assert len(sizes) == 5 and any(height % 2 and width % 2 for _, _, height, width in sizes)
    measured = report["measured"]
    assert measured["student"]["parameters"] == load(str(folder)).model.num_parameters()
    assert measured["student"]["flops"] > 0 and measured["machine"]["threads"] == torch.get_num_threads()
    assert set(measured["latency"]) == {"student, PyTorch", "student, ONNX Runtime, float32"}
    for one in measured["latency"].values():
        assert 0 < one["q1_ms"] <= one["median_ms"] <= one["q3_ms"]
    assert report["bytes"] == (out / "model.onnx").stat().st_size
    assert (out / "preprocessor_config.json").is_file()
    assert f"{measured['student']['parameters']:,}" in printed and "Any batch, any size that" in printed


def test_the_printed_lines_run_without_torch(exported: tuple[Path, Path, str], tmp_path: Path) -> None:
    code = exported[2].split("Run it with:\n")[1]
    assert len(code.strip().splitlines()) <= 10
    code = "import sys\nsys.modules['torch'] = None\n" + code
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 3, 24, 32)"


def test_a_finished_export_is_not_lost(
    exported: tuple[Path, Path, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out, _ = exported
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert main([str(folder)]) == 2
    assert "--overwrite" in capsys.readouterr().err

    def wrong(*args: Any) -> Any:
        return lambda images: [torch.full((len(images), 3, -(-images.shape[2] // 4), -(-images.shape[3] // 4)), 7.0)]

    monkeypatch.setattr("cankd_hf.export.command.onnx_runner", wrong)
    assert main([str(folder), "--overwrite", "--no-latency"]) == 2
    assert re.search(r"batch 1, 96 x 128: differs by .*allowed is 1\.\d+e-04", capsys.readouterr().err)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_dense_detectors_select_as_torchvision_does() -> None:
    for kind in ("retinanet_resnet", "fcos_resnet", "faster_rcnn_resnet", "cascade_rcnn_resnet"):
        torch.manual_seed(0)
        source = Source(kind, "detection", talkative(kind))
        form = source.form()
        with torch.no_grad():
            results = compare(source, form, lambda x, f=form: list(f.module(x)), [(1, 96, 128), (3, 75, 101)], True)
        for result in results:
            assert result.passed and result.detections > 10 * result.shape[0], (kind, result)


def test_queries_may_change_places_but_not_their_values() -> None:
    logits, boxes = torch.randn(2, 6, 3), torch.rand(2, 6, 4)
    turned = [x[:, [2, 0, 1, 5, 4, 3]] for x in (logits, boxes)]
    for ours, theirs in zip(in_order([logits, boxes], turned), (logits, boxes), strict=True):
        assert torch.equal(ours, theirs)
    # A box that belongs to other logits is no permutation.
    mixed = in_order([logits, boxes], [turned[0], boxes])
    assert not (torch.equal(mixed[0], logits) and torch.equal(mixed[1], boxes))


def test_suppression_keeps_images_and_groups_apart() -> None:
    box = torch.tensor([10.0, 10.0, 50.0, 50.0])
    boxes = box.expand(2, 4, 4) + torch.tensor([0.0, 1.0, 0.0, 30.0]).reshape(1, 4, 1)
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6], [0.5, 0.6, -1.0, 0.4]])
    groups = torch.tensor([[0, 0, 1, 0], [2, 2, 2, 2]])
    values, places = suppress(boxes, scores, groups, 0.5, 3, 3)
    assert torch.equal(values, torch.tensor([[0.9, 0.7, 0.6], [0.6, 0.4, -1.0]]))
    assert places[0].tolist() == [0, 2, 3] and places[1, :2].tolist() == [1, 3]


def test_padding_for_symbols_is_that_of_the_libraries() -> None:
    from timm.layers.padding import get_same_padding

    for size, kernel, stride, dilation in itertools.product(range(1, 40), (1, 2, 3, 5, 7), (1, 2, 3, 4), (1, 2)):
        assert same_padding(size, kernel, stride, dilation) == get_same_padding(size, kernel, stride, dilation)


def test_any_size_of_a_backbone_that_pads_as_tensorflow_does() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(create_conv2d(3, 3, size, stride=2, padding="same") for size in (3, 5, 3, 5, 3))).eval()
    sized = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    with traceable(net):
        program = torch.export.export(net, (torch.randn(2, 3, 96, 128),), dynamic_shapes=(sized,))
    sides = next(iter(program.graph.output_node().args[0])).meta["val"].shape[2:]
    assert all(len(str(side)) < 80 for side in sides), sides  # thousands of letters where sizes pile up
    for size in ((97, 131), (64, 64), (33, 200)):
        images = torch.randn(1, 3, *size)
        torch.testing.assert_close(program.module()(images), net(images))
    assert padding.get_same_padding is not same_padding


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "torch-export"])
@pytest.mark.parametrize("backbone", [SAME, BIT])
def test_students_that_pad_as_tensorflow_does(backbone: dict[str, Any], format: str, tmp_path: Path) -> None:
    given = StudentConfig(backbone=backbone, fpn={"fpn_channels": 8, "head_channels": 8})
    folder = saved(build_student(given, AutoModelForSemanticSegmentation, NAMES, 9), tmp_path / "s")
    assert main([str(folder), "--format", format, *SIZE]) == 0
    report = json.loads((folder / format / "export.json").read_text(encoding="utf-8"))
    assert report["dynamic"] == ["batch", "height", "width"] and report["fixed_because"] is None


@pytest.mark.slow
def test_programs_round_trip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(talkative("retinanet_resnet"), tmp_path / "s")
    file = tmp_path / "out" / "detector.pt2"
    assert main([str(folder), "--format", "torch-export", "--output", str(file), *SIZE]) == 0
    source = load(str(folder))
    module = torch.export.load(file).module()
    assert all(r.passed for r in compare(source, source.form(), lambda x: list(module(x)), [(2, 224, 170)], True))
    assert "torch.export.load" in capsys.readouterr().out


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {
        (str(tmp_path),): "found no config.json",
        ("x", "--format", "tflite"): "expected onnx or torch-export, got 'tflite'",
        ("x", "--dtype", "int4"): "expected one of float32, float16, bfloat16, int8, got 'int4'",
        ("x", "--dtype", "bfloat16"): "--format torch-export",
        ("x", "--runs", "0"): "--runs: expected at least 1, got 0",
        ("x", "--size", "8", "64"): "--size: expected at least 32 x 32",
        ("x", "--compile", "--no-latency"): "contradicts --compile",
        ("x", "--output", "model.pt2"): "does not end in .onnx",
    }
    for argv, message in cases.items():
        assert main(list(argv)) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install onnx onnxruntime onnxscript"):
        checks.check_options(
            argparse.Namespace(
                checkpoint="x", format="onnx", dtype="float32", batch_size=1, runs=1, threads=None, size=None
            )
        )


def test_help_is_light() -> None:
    code = (
        "import sys\nfrom cankd_hf.export import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'onnx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


def native_detector(kind: str) -> PreTrainedModel:
    """A tiny DETR or RT-DETR."""
    from transformers import AutoConfig, AutoModelForObjectDetection

    backbone = {**RESNET, "out_features": ["stage2", "stage3", "stage4"] if kind == "rt_detr" else ["stage4"]}
    settings: dict[str, Any] = {"num_labels": 3, "d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    if kind == "rt_detr":
        settings |= {"encoder_hidden_dim": 32, "encoder_in_channels": [8, 16, 16], "decoder_in_channels": [32] * 3}
        # All 630 cells are queries: which of many equal ones of a random model come first is chance.
        settings |= {"num_queries": 630, "num_denoising": 0, "decoder_layers": 2, "num_feature_levels": 3}
        settings |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    else:
        settings |= {"encoder_layers": 1, "decoder_layers": 1, "num_queries": 20, "use_timm_backbone": False}
        settings |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "use_pretrained_backbone": False}
    return AutoModelForObjectDetection.from_config(AutoConfig.for_model(kind, backbone_config=backbone, **settings))


def made(kind: str) -> PreTrainedModel:
    """The tiny model of any kind."""
    if kind in KINDS:
        return student(kind)
    if kind in DETECTORS:
        return talkative(kind)
    if kind == "backbone":
        return load_backbone(RESNET, out_indices=[1, 2, 3, 4])
    return dino() if kind == "dino" else native_detector(kind)


EVERY_KIND = [*KINDS, *DETECTORS, "backbone", "rt_detr", "detr", "dino"]


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "torch-export"])
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_every_kind(kind: str, format: str, tmp_path: Path) -> None:
    folder = saved(made(kind), tmp_path / "s")
    assert main([str(folder), "--format", format, *SIZE]) == 0
    report = json.loads((folder / format / "export.json").read_text(encoding="utf-8"))
    print(f"MATRIX {kind} {format} {'+'.join(report['dynamic'])} {report['fixed_because']}")
    assert (report["fixed_because"] is None) == (kind not in ONE_SIZE | ONE_SIZE_IN[format])


@pytest.mark.slow
@pytest.mark.parametrize(("format", "dtype"), [("onnx", "float16"), ("torch-export", "bfloat16")])
@pytest.mark.parametrize("kind", ["resnet_fpn", "retinanet_resnet"])
def test_half_precision(kind: str, format: str, dtype: str, tmp_path: Path) -> None:
    folder = saved(made(kind), tmp_path / "s")
    assert main([str(folder), "--format", format, "--dtype", dtype, *SIZE]) == 0
