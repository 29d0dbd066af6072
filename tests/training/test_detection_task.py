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
from transformers import AutoImageProcessor, DetrImageProcessor, PreTrainedModel, RTDetrImageProcessor, pipeline

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


def test_a_native_detector_is_a_student_like_any_other(tmp_path: Path) -> None:
    """Its task is found from the class, its image processor keeps the size it was evaluated at."""
    values = {"model_type": "yolos", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    values |= {
        "intermediate_size": 16,
        "image_size": [64, 64],
        "num_detection_tokens": 5,
        "use_mid_position_embeddings": False,
    }
    task = DetectionTask({0: "one"})
    model = task.build_student(StudentConfig(config=values))
    assert isinstance(model, PreTrainedModel) and model.config.num_labels == 1
    assert isinstance(task_for(model), DetectionTask)
    task.image_processor(DataConfig(path="x", image_size=[64, 64])).save_pretrained(tmp_path)
    batch = AutoImageProcessor.from_pretrained(tmp_path)(Image.new("RGB", (90, 50)), return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 3, 64, 64)
