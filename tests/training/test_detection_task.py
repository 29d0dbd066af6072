"""Detection through the commands: a run, its results, its picture, its score again, and a run that goes on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
    DetrImageProcessor,
    RTDetrImageProcessor,
    pipeline,
)

from cankd_hf import evaluate, train
from cankd_hf.data.config import DataConfig
from cankd_hf.models.student_config import StudentConfig
from cankd_hf.tasks import DetectionTask, task_for
from cankd_hf.tasks.detection import detections

from .boxes import write_boxes

RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
RESNET["layer_type"] = "basic"
FCOS = {"head": "fcos", "head_layers": 1, "score_threshold": 0.0}


def recipe(folder: Path) -> str:
    """A recipe of two steps on a generated folder, written to a file."""
    settings = {
        "task": "detection",
        "output_dir": str(folder / "run"),
        "data": {
            "path": str(write_boxes(folder / "boxes")),
            "eval_split": "validation",
            "test_split": "test",
            "image_size": [64, 96],
            "crop_size": [64, 96],
        },
        "student": {"backbone": RESNET, "fpn": {"fpn_channels": 8, **FCOS}},
        "teacher": {
            "config": {"model_type": "cankd_fpn", "backbone_config": RESNET, "fpn_channels": 16, **FCOS},
            "fit": {"max_steps": 2},
        },
        "distill": {"terms": [{"loss": "cankd", "weight": 2.5, "pairs": [[i, i] for i in range(4)]}]},
        "baseline": True,
        "training": {
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 2,
            "logging_steps": 1,
            "save_steps": 1,
            "use_cpu": True,
            "disable_tqdm": True,
        },
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings))
    return str(file)


def test_a_run_ends_in_a_table_a_picture_and_a_student_that_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, run = recipe(tmp_path), tmp_path / "run"
    assert train.main([file]) == 0
    shown = capsys.readouterr().out
    for words in ("teacher", "student alone", "student distilled", "ap50", "object-detection", "predictions.png"):
        assert words in shown, shown
    results = json.loads((run / "results.json").read_text())
    assert [arm["steps"] for arm in results["arms"]] == [2, 2, 2]
    assert results["metric"] == "ap" and all(0 <= arm["scores"]["ap"] <= 1 for arm in results["arms"])
    assert {"ap_red", "ap_green", "ap_blue"} <= results["arms"][-1]["scores"].keys()
    assert (run / "predictions.png").stat().st_size > 10_000
    # The saved folder gives the same scores: with its recipe, and where only the architecture says what it does.
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((run / name).read_bytes())
    data = [f"data.path={tmp_path}/boxes", "data.test_split=test", "data.image_size=[64,96]"]
    for words in ([str(run)], [str(bare), *data]):
        assert evaluate.main([*words, "--json", str(tmp_path / "scores.json")]) == 0
        scores = json.loads((tmp_path / "scores.json").read_text())
        assert scores["ar100"] == pytest.approx(results["arms"][-1]["scores"]["ar100"], abs=1e-6)
        assert scores["ap"] == pytest.approx(results["arms"][-1]["scores"]["ap"], abs=1e-6)
    found = pipeline("object-detection", str(run))(Image.new("RGB", (120, 80)), threshold=0.0)
    assert found and found[0]["label"] in ("red", "green", "blue")
    # Half of the run, and the other half from its checkpoint, in another folder.
    again = [file, f"output_dir={tmp_path}/again", "baseline=false", "teacher.fit=null", "teacher.config=null"]
    assert train.main([*again, f"teacher.model={run}/teacher", "--resume", str(run / "checkpoint-1")]) == 0
    resumed, whole = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", run))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("model_type", "processor"), [("detr", DetrImageProcessor), ("rt_detr", RTDetrImageProcessor)]
)
def test_detections_are_those_of_the_image_processors(model_type: str, processor: type) -> None:
    torch.manual_seed(0)
    outputs = SimpleNamespace(logits=torch.randn(2, 12, 4), pred_boxes=torch.rand(2, 12, 4) / 2 + 0.1)
    sizes = torch.tensor([[60, 80], [90, 40]])
    expected = processor().post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
    for ours, theirs in zip(detections(vars(outputs), sizes, model_type), expected, strict=True):
        best = ours["scores"].argsort(descending=True)
        # DETR's processor keeps the best class of each query alone; ours keeps every pair, as COCO scores them.
        if model_type == "detr":
            for score, label, box in zip(theirs["scores"], theirs["labels"], theirs["boxes"], strict=True):
                row = (ours["scores"] - score).abs().argmin()
                torch.testing.assert_close((ours["scores"][row], ours["boxes"][row]), (score, box))
                assert ours["labels"][row] == label
            continue
        count = len(theirs["scores"])
        order = theirs["scores"].argsort(descending=True)
        torch.testing.assert_close(ours["boxes"][best[:count]], theirs["boxes"][order])
        torch.testing.assert_close(ours["scores"][best[:count]], theirs["scores"][order])


NATIVE = {
    "rt_detr": {
        "backbone_config": {**RESNET, "model_type": "rt_detr_resnet", "out_features": ["stage2", "stage3", "stage4"]},
        "encoder_in_channels": [8, 16, 16],
        "encoder_hidden_dim": 16,
        "decoder_in_channels": [16, 16, 16],
        "num_denoising": 4,
    },
    "detr": {"backbone_config": RESNET, "encoder_layers": 1},
}
TRANSFORMER = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_attention_heads": 2}
TRANSFORMER |= {"decoder_attention_heads": 2, "decoder_layers": 1, "num_queries": 12}


@pytest.mark.parametrize("kind", NATIVE)
def test_a_native_detector_is_a_student_like_any_other(kind: str, tmp_path: Path) -> None:
    settings = yaml.safe_load(Path(recipe(tmp_path)).read_text())
    settings["student"] = {"config": {"model_type": kind, **NATIVE[kind], **TRANSFORMER}}
    settings["baseline"] = False
    settings["teacher"].pop("fit")
    settings["distill"]["terms"][0]["pairs"] = "auto"
    file, run = tmp_path / "native.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(settings))
    assert train.main([str(file)]) == 0
    assert 0 <= json.loads((run / "results.json").read_text())["arms"][-1]["scores"]["ap"] <= 1
    model = AutoModelForObjectDetection.from_pretrained(run)
    assert isinstance(task_for(model), DetectionTask) and model.config.id2label == {0: "red", 1: "green", 2: "blue"}
    found = pipeline("object-detection", str(run))(Image.new("RGB", (120, 80)), threshold=0.0)
    assert found and {one["label"] for one in found} <= {"red", "green", "blue"}


def test_one_class_is_enough_and_the_image_processor_does_as_evaluation_does(tmp_path: Path) -> None:
    task = DetectionTask({0: "one"})
    assert task.build_student(StudentConfig(backbone=RESNET, fpn=FCOS)).config.num_labels == 1
    for keep_aspect, expected in ((False, (64, 96)), (True, (53, 96))):
        config = DataConfig(path="x", image_size=[64, 96], keep_aspect=keep_aspect)
        task.image_processor(config).save_pretrained(tmp_path)
        batch = AutoImageProcessor.from_pretrained(tmp_path)(Image.new("RGB", (90, 50)), return_tensors="pt")
        assert batch["pixel_values"].shape[-2:] == expected
        assert ("pixel_mask" in batch) == keep_aspect


@pytest.mark.parametrize(("content", "said"), [("", "saved student"), ("task: features\n", "'features'")])
def test_evaluating_what_has_no_labelled_score_is_refused(
    content: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content:
        (tmp_path / "recipe.yaml").write_text(content)
    assert evaluate.main([str(tmp_path), "data.path=shapes"]) == 2
    assert said in capsys.readouterr().err
