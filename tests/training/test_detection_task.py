"""Detection through the commands: a run, its results, its picture, its score again, and a run that goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, pipeline

from cankd_hf import evaluate, train
from cankd_hf.config.data import DataConfig
from cankd_hf.config.student import StudentConfig
from cankd_hf.hub.files import student_files
from cankd_hf.tasks import DetectionTask, task_for

from .detection_folders import write_boxes
from .native_detector_configs import config as native_config
from .native_detector_configs import write_tokenizer

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
    ("kind", "hub_task", "options"),
    [
        ("rt_detr", "object-detection", {}),
        ("grounding-dino", "zero-shot-object-detection", {"candidate_labels": ["red", "green", "blue"]}),
    ],
)
def test_a_native_detector_is_a_student_like_any_other(
    kind: str, hub_task: str, options: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = yaml.safe_load(Path(recipe(tmp_path)).read_text())
    settings["student"] = {"config": native_config(kind)}
    settings["baseline"] = False
    settings["teacher"].pop("fit")
    settings["distill"]["terms"][0]["pairs"] = "auto"
    if hub_task.startswith("zero-shot"):
        settings["student"] |= {"tokenizer": str(write_tokenizer(tmp_path / "tokenizer"))}
        settings["student"] |= {"inherit": ["model.input_proj_vision", "model.encoder"]}
        settings["teacher"]["config"] = native_config(kind)
    file, run = tmp_path / "native.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(settings))
    assert train.main([str(file)]) == 0
    shown = capsys.readouterr().out
    assert f'pipeline("{hub_task}", "{run}")' in shown
    arm = json.loads((run / "results.json").read_text())["arms"][-1]
    assert 0 <= arm["scores"]["ap"] <= 1 and (run / "predictions.png").stat().st_size > 10_000
    assert arm["inherited"] == settings["student"].get("inherit", [])
    predict = pipeline(hub_task, str(run))
    assert isinstance(task_for(predict.model), DetectionTask)
    assert predict.model.config.id2label == {0: "red", 1: "green", 2: "blue"}
    found = predict(Image.new("RGB", (120, 80)), threshold=0.0, **options)
    assert found and {one["label"] for one in found} <= {"red", "green", "blue"}
    # Without its recipe the folder still says what it does, and scores the same.
    (run / "recipe.yaml").unlink()
    data = [f"data.path={tmp_path}/boxes", "data.test_split=test", "data.image_size=[64,96]"]
    assert evaluate.main([str(run), *data, "--json", str(tmp_path / "scores.json")]) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["ap"] == pytest.approx(arm["scores"]["ap"], abs=1e-6)
    uploads = {path.name for path in student_files(run)}
    assert {"config.json", "model.safetensors", "results.json"} <= uploads
    assert hub_task == "object-detection" or {"processor_config.json", "tokenizer.json"} <= uploads


def test_a_model_changes_no_task_but_has_one_that_serves_it() -> None:
    task = DetectionTask({0: "red", 1: "green", 2: "blue"})
    before = dict(vars(task))
    strict = task.build_student(StudentConfig(config=native_config("rt_detr")))
    free = task.build_student(StudentConfig(backbone=RESNET, fpn=FCOS))
    served, other = task.for_model(strict), task.for_model(free)
    assert vars(task) == before and type(task).pipeline_tag == "object-detection"
    assert (
        served.rule.strict
        and not other.rule.strict
        and (served.model_type, other.model_type) == ("rt_detr", "cankd_fpn")
    )
    sample = [{"pixel_values": torch.zeros(3, 60, 90)}]
    assert served.collate(sample)["pixel_values"].shape[-2:] == (64, 96)
    assert other.collate(sample)["pixel_values"].shape[-2:] == (60, 90)


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
        (tmp_path / "config.json").write_text("{}")
    assert evaluate.main([str(tmp_path), "data.path=shapes"]) == 2
    assert said in capsys.readouterr().err
