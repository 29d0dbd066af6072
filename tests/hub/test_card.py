"""Cards say what was recorded and nothing else."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from transformers import BitImageProcessor, ResNetConfig

from cankd_hf.errors import InputError
from cankd_hf.hub.card import card_for, write_card
from cankd_hf.hub.facts import hub_id, licence_of
from cankd_hf.losses import LOSSES
from cankd_hf.models.students import StudentConfig, build_student
from cankd_hf.training.facts import _wall_clock

from .stand_in import problems

RUN: dict[str, Any] = {
    "pipeline_tag": "image-segmentation",
    "parameters": 62894,
    "teacher": {"model": "facebook/dinov2-base", "revision": "f9e44c8", "taps": ["stage12"], "parameters": 85000000},
    "task_weight": 1.0,
    "terms": [
        {
            "name": "cankd",
            "loss": "cankd",
            "pairs": [
                {"student_stride": 16.0, "teacher_stride": 14.0, "weight": 10.0},
                {"student_stride": 32.0, "teacher_stride": 14.0, "weight": 5.0},
            ],
        },
        {
            "name": "control",
            "loss": "instance_mse",
            "pairs": [{"student_stride": 16.0, "teacher_stride": 14.0, "weight": 1.0}],
        },
        {
            "name": "rotated",
            "loss": "mse",
            "share": 0.1,
            "conditioning": "phi_s",
            "pairs": [{"student_stride": 16.0, "teacher_stride": 14.0, "weight": 1.0}],
        },
    ],
    "step": 300,
    "planned_steps": 300,
    "batch_size": 16,
    "learning_rate": 0.003,
    "precision": "bf16",
    "seed": 7,
    "hardware": "NVIDIA H200",
    "processes": 2,
    "seconds": 5400.0,
}
RESULTS: dict[str, Any] = {
    "metric": "miou",
    "split": "test",
    "gap_closed": 0.5,
    "facts": {"splits": {"train": 367, "test": 233}},
    "arms": [
        {"name": "teacher", "parameters": 85000000, "steps": 0, "scores": {"miou": 0.7, "pixel_accuracy": 0.9}},
        {"name": "student alone", "parameters": 62894, "steps": 300, "scores": {"miou": 0.5, "runtime": 1.0}},
        {"name": "student distilled", "parameters": 62894, "steps": 300, "scores": {"miou": 0.6, "iou_car": 0.4}},
    ],
}
RECIPE: dict[str, Any] = {
    "data": {"path": "me/streets", "revision": "main", "crop_size": [240, 180]},
    "student": {"backbone": "timm/resnet18.a1_in1k"},
}


def folder_with(place: Path, run: Any = None, results: Any = None, recipe: Any = None) -> Path:
    """A folder of a student with these facts beside it."""
    folder = place / "streets-student"
    folder.mkdir()
    config = ResNetConfig(id2label={0: "road", 1: "car"}).to_dict()
    config["architectures"] = ["FPNForSemanticSegmentation"]
    config["auto_map"] = {"AutoConfig": "configuration_cankd_fpn.FPNConfig"}
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in (("distillation.json", run), ("results.json", results)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    if recipe is not None:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def test_a_card_holds_every_recorded_fact(tmp_path: Path) -> None:
    card = write_card(folder_with(tmp_path, RUN, RESULTS, RECIPE), licence="apache-2.0").read_text()
    for words in (
        "gives every pixel of an image one of 2 classes, distilled from facebook/dinov2-base",
        "| student alone | 62,894 | 300 | 0.5000 |",
        "| student distilled | 62,894 | 300 | 0.6000 |",
        "| teacher | 85,000,000 |  | 0.7000 |",
        "closed 50% of the gap in Mean IoU",
        "Scores of the test split, from one run with seed 7",
        "revision `f9e44c8`",
        "[me/streets](https://huggingface.co/datasets/me/streets), revision `main`, 367 training images, 233 test",
        "| cankd | 16 | 14 | 10 | 5 |",
        "| cankd | 32 | 14 | 5 | 2.5 |",
        "| control | 16 | 14 | 1 |  |",
        "| rotated (phi_s) | 16 | 14 | 10% of the gradient |  |",
        "300 steps, batch 16, learning rate 0.003, bf16, seed 7",
        "2 x NVIDIA H200; 90 min of training",
        "the weights of [timm/resnet18.a1_in1k]",
        "road, car",
        LOSSES["cankd"].citation,
        LOSSES["instance_mse"].citation,
        LOSSES["mse"].citation,
    ):
        assert words in card, words


def test_a_detector_says_what_it_finds_what_it_drops_and_that_it_did_not_gain(tmp_path: Path) -> None:
    run = {**RUN, "pipeline_tag": "object-detection", "energy": {"joules": 7200.0, "measured": "GPU energy counter"}}
    run["terms"] = [{"name": "cankd", "loss": "cankd", "pairs": [{**RUN["terms"][0]["pairs"][0], "weight": 2.5}]}]
    run["terms"][0]["pairs"][0]["student_stride"] = 61.967733539318674
    arms = [
        {"name": name, "parameters": 1, "steps": 1, "scores": {"ap": score, "ap50": 0.9}}
        for name, score in (("teacher", 0.57), ("student alone", 0.52), ("student distilled", 0.51))
    ]
    results = {**RESULTS, "metric": "ap", "gap_closed": -0.2, "arms": arms}
    recipe = {"data": {"path": "me/cells", "image_size": [240, 320]}, "hub": {"license": "mit", "tags": ["cells"]}}
    folder = folder_with(tmp_path, run, results, recipe)
    config = json.loads((folder / "config.json").read_text())
    thresholds = {"score_threshold": 0.2, "nms_threshold": 0.6}
    (folder / "config.json").write_text(json.dumps({**config, **thresholds}))
    file = write_card(folder)
    card, data = file.read_text(), ModelCard.load(file).data
    for words in (
        "An object detector of 62,894 parameters that finds and boxes 2 kinds of things",
        "| student distilled | 1 | 1 | 0.5100 | 0.9000 |",
        "Distillation did not help here: the distilled student is below the student alone in AP.",
        "- **Energy**: 2.0 Wh, measured by: GPU energy counter",
        "scored at 240 x 320",
        "| cankd | 62 | 14 | 2.5 | 1.25 |",
        "It finds 2 classes and nothing else: road, car.",
        "Detections below a score of 0.2 are dropped",
    ):
        assert words in card, words
    assert "closed" not in card
    assert data.license == "mit" and "cells" in data.tags and problems(card) == []
    assert {result.metric_type for result in data.eval_results} == {"map", "map_50"}


def test_several_teachers_are_all_named(tmp_path: Path) -> None:
    local = {"model": "second", "class": "FPNForSemanticSegmentation", "taps": ["neck.0"]}
    dino = RUN["teacher"]
    cankd, control, _ = RUN["terms"]
    logits = {"name": "kl", "loss": "kl", "teacher": "local", "pairs": [{"weight": 2.0}]}
    terms = [{**cankd, "teacher": "dino"}, {**control, "teacher": "local"}, logits]
    recipe = {**RECIPE, "teachers": {"dino": {"model": dino["model"]}, "local": {"fit": {"max_steps": 2}}}}
    run = {**RUN, "teachers": {"dino": dino, "local": local, "sam": {"model": "facebook/sam"}}, "terms": terms}
    file = write_card(folder_with(tmp_path, run, RESULTS, recipe))
    card, data = file.read_text(), ModelCard.load(file).data
    fitted = "a FPNForSemanticSegmentation trained in the same run"
    for words in (
        f"distilled from facebook/dinov2-base and {fitted} and facebook/sam",
        "- **Teacher dino**: [facebook/dinov2-base](https://huggingface.co/facebook/dinov2-base), revision `f9e44c8`",
        f"- **Teacher local**: {fitted}, taps `neck.0`",
        "- **Teacher sam**: [facebook/sam]",
        "| distillation loss | teacher | student stride | teacher stride | weight | mu |",
        "| cankd | dino | 16 | 14 | 10 | 5 |",
        "| control | local | 16 | 14 | 1 |  |",
        "| kl | local | logits | logits | 2 |  |",
        "What is wrong with its teachers may be wrong with it.",
    ):
        assert words in card, words
    assert data.base_model == ["timm/resnet18.a1_in1k", "facebook/dinov2-base", "facebook/sam"]
    assert "**Teacher**" not in card and problems(card) == []


def test_metadata_is_complete_and_valid(tmp_path: Path) -> None:
    file = write_card(folder_with(tmp_path, RUN, RESULTS, RECIPE), licence="apache-2.0", tags=["streets"])
    assert problems(file.read_text()) == []
    card = ModelCard.load(file)
    data = card.data
    assert data.base_model == ["timm/resnet18.a1_in1k", "facebook/dinov2-base"]
    assert data.base_model_relation == "finetune" and data.datasets == ["me/streets"]
    assert (data.pipeline_tag, data.library_name, data.license) == ("image-segmentation", "transformers", "apache-2.0")
    assert "streets" in data.tags
    [result] = data.eval_results  # scores without a place on the Hub (per class, timing) are left out
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("mean_iou", 0.6, "test")


def test_what_was_not_recorded_is_absent(tmp_path: Path) -> None:
    file = write_card(folder_with(tmp_path))
    text, data = file.read_text(), ModelCard.load(file).data
    for words in ("What it reached", "**Teacher**", "**Data**", "**Training**", "**Machine**", "None", "nan", "seed"):
        assert words not in text, words
    assert "No score was recorded" in text
    assert data.eval_results is None and data.get("base_model") is None and data.get("datasets") is None
    assert data.license == "unknown" and problems(text) == []


def test_scores_without_number_and_gaps_without_meaning_are_left_out(tmp_path: Path) -> None:
    results = {**RESULTS, "gap_closed": None, "arms": [{"name": "student", "scores": {"miou": float("nan")}}]}
    text = write_card(folder_with(tmp_path, RUN, results, RECIPE)).read_text()
    body = text.rpartition("<!--")[0]
    assert "nan" not in body and "closed" not in body and "What it reached" not in body


def test_the_time_of_a_resumed_run_is_told_only_where_all_of_it_was_counted() -> None:
    def state(*entries: dict[str, float]) -> SimpleNamespace:
        return SimpleNamespace(log_history=list(entries), global_step=100)

    end = {"train_runtime": 50.0, "train_steps_per_second": 2.0}
    assert _wall_clock(state(end)) == {"seconds": 50.0}
    assert _wall_clock(state({**end, "train_steps_per_second": 1.0})) == {}, "half of the steps ran before"
    assert _wall_clock(state({"train_seconds": 80.0}, {**end, "train_seconds": 90.0})) == {"seconds": 90.0}
    assert _wall_clock(state()) == {}


def test_local_teachers_and_data_are_no_models_of_the_hub(tmp_path: Path) -> None:
    run = {**RUN, "teacher": {"model": "teacher", "class": "FPNForSemanticSegmentation"}}
    recipe = {"data": {"path": str(tmp_path)}, "student": {}, "teacher": {"fit": {"max_steps": 2}}}
    file = write_card(folder_with(tmp_path, run, RESULTS, recipe))
    data = ModelCard.load(file).data
    assert data.get("base_model") is None and data.get("datasets") is None
    body = file.read_text().rpartition("<!--")[0].replace(f'"{file.parent}"', "")
    assert "trained in the same run" in body and str(tmp_path.parent) not in body
    recipe["teacher"] = {"model": "facebook/dinov2-base", "adapt": {"tune": "head"}, "fit": {"max_steps": 2}}
    (tmp_path / "adapted").mkdir()
    file = write_card(folder_with(tmp_path / "adapted", run, RESULTS, recipe))
    assert "trained in the same run from the weights of facebook/dinov2-base" in file.read_text()
    assert ModelCard.load(file).data.base_model == ["facebook/dinov2-base"]


def test_a_card_changed_by_hand_is_kept_and_pushed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = folder_with(tmp_path, RUN, RESULTS, RECIPE)
    file = write_card(folder)
    file.write_text(file.read_text().replace("## Limits", "## Limits\n\nNot for night scenes."))
    with caplog.at_level(logging.WARNING):
        write_card(folder)
    assert "changed by hand" in caplog.text and "night scenes" in file.read_text()
    pushed = card_for(folder, "me/streets-student")
    assert "night scenes" in pushed and '"me/streets-student"' in pushed and str(folder) not in pushed
    (folder / "README.md").write_text("# Mine\n")
    assert card_for(folder, "me/streets-student") == "# Mine\n"


def test_writing_again_refreshes_an_untouched_card(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, RUN)
    assert "What it reached" not in write_card(folder).read_text()
    (folder / "results.json").write_text(json.dumps(RESULTS))
    assert "What it reached" in write_card(folder).read_text()


def test_licences_come_from_the_models_own_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A teacher\n")
    assert licence_of(str(tmp_path)) == "mit"
    assert licence_of("nobody/nothing") is None, "offline: not known"


def test_broken_facts_are_one_clear_message(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    (folder / "results.json").write_text("{")
    with pytest.raises(InputError, match="results.json: expected JSON"):
        write_card(folder)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("facebook/dinov2-base", True),
        ("timm/resnet18.a1_in1k", True),
        ("timm/resnet18", False),
        ("shapes", False),
        ("/data/camvid", False),
        ("../shared/data", False),
        (None, False),
    ],
)
def test_what_can_be_on_the_hub(name: str | None, found: bool) -> None:
    assert hub_id(name) == (name if found else None)


def test_the_code_for_a_timm_backbone_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"model_type": "timm_backbone", "backbone": "test_resnet", "out_indices": [1, 2]}
    build_student(StudentConfig(backbone=fields), None, {}).save_pretrained(tmp_path / "timm")
    BitImageProcessor(do_resize=False, do_center_crop=False).save_pretrained(tmp_path / "timm")
    card = write_card(tmp_path / "timm").read_text()
    assert "image backbone" in card and "pipeline_tag: image-feature-extraction" in card
    Image.effect_noise((64, 64), 80).convert("RGB").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(card.split("```python\n")[1].split("```")[0], {})
    assert shown.getvalue().count("torch.Size([1, ") == 2


def test_help_of_push_needs_no_torch(tmp_path: Path, repo_root: Path) -> None:
    code = "import sys, cankd_hf.push as m; m.parser().format_help(); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(repo_root)})
    assert done.returncode == 0
