"""`cankd init`: recipes for all answers, nothing overwritten, nothing asked where nobody answers."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from transformers import Dinov2Config, Dinov2Model, ResNetConfig, ResNetModel

from cankd_hf.__main__ import main
from cankd_hf.cli import init, starting
from cankd_hf.cli.starting import DEVICES, TEACHERS, Answers, Size, recipe_text
from cankd_hf.config.distill import Share
from cankd_hf.config.reading import read_recipe
from cankd_hf.runs import measured
from cankd_hf.runs.recipe import load_recipe
from cankd_hf.tasks import TASKS

STARTED = [name for name, task in TASKS.items() if task.starter is not None]
DATA = {
    "path": "/data/ünï: x",
    "train_split": "train[:90%@0]",
    "eval_split": "train[90%:@0]",
    "image_size": [288, 384],
}


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "LOOKED_AT", 2)
    monkeypatch.setattr(measured, "MOST", 2)


@pytest.mark.parametrize("task", STARTED)
def test_every_combination_of_answers_is_a_recipe_whose_lines_all_say_why(task: str) -> None:
    starter = TASKS[task].starter
    assert starter is not None
    switches = [True, False]
    for device, teacher, gpu, cached in itertools.product(DEVICES, [*TEACHERS, "runs/mine"], switches, switches):
        if (teacher == "none" and (cached or not starter.labelled)) or (cached and not gpu):
            continue
        answers = Answers(
            *(task, starter, DATA, "mine", device, teacher, 2.0, gpu, gpu, 4 if gpu else 0, 900, gpu, cached)
        )
        text = recipe_text(answers)
        recipe, problems = read_recipe(text, (), "mine.yaml")
        problems.raise_all()
        assert recipe.data.path == DATA["path"] and recipe.training["max_steps"] == 900
        named = recipe.named_teachers()
        if named:  # the measured loss is for a teacher of the task; one that knows images alone has the plain one
            own = starter.task_loss and teacher == "runs/mine"
            term, gentle = recipe.distill.terms[0], bool(own) and starter.share > 0
            assert term.loss == (starter.task_loss if own else "instance_mse")
            if starter.labelled:  # what was measured beside pretrained weights; else `weights: recommended`
                assert isinstance(term.weight, Share)
                assert (term.weight.share, term.fade) == ((0.1, [0.3, 0.6]) if gentle else (0.5, [0.5, 0.9]))
                assert (recipe.distill.guard is None) == gentle
        assert bool(named) == (teacher != "none") and all((one.cache is not None) == cached for one in named.values())
        lines = text.splitlines()
        for number, line in enumerate(lines):
            key, _, rest = line.partition("#")
            if key.strip() and not key.strip().endswith(":"):  # a section alone needs no reason
                assert rest.strip() or lines[number - 1].strip().startswith("#"), line
        assert max(map(len, lines)) <= 160


def test_without_a_terminal_the_missing_options_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    assert main(["init", "--data", "shapes", "--hours", "1"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "give --task --device --teacher, or --yes" in error
    (tmp_path / "recipe.yaml").write_text("mine")
    assert main(["init", "--data", "shapes", "--yes"]) == 2
    assert "recipe.yaml is there already" in capsys.readouterr().err
    assert (tmp_path / "recipe.yaml").read_text() == "mine"


def test_a_person_is_asked_again_where_an_answer_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = iter(["", "/no/where", "shapes", "flying", "", "toaster", "phone", "none", "many", "0.5", "/no/model", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    assert main(["init", "--no-measure"]) == 0
    recipe = load_recipe("recipe.yaml")
    assert (recipe.task, recipe.data.path, recipe.teacher) == ("segmentation", "shapes", None)
    assert "efficientnet_lite0" in str(recipe.student.backbone) and next(said, None) is None
    shown = capsys.readouterr().out
    assert "--student: expected a folder with a model" in shown
    assert "the Hub cannot be reached; give --student" in " ".join(shown.split())
    assert shown.count("--device: expected") == shown.count("--hours: expected") == 1 and "shapes: generated" in shown

    def ended(_: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", ended)
    assert main(["init", "other.yaml", "--no-measure"]) == 2
    assert "the input ended" in capsys.readouterr().err and not Path("other.yaml").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--device", "toaster", "--hours", "-1", "--data", "/no/where", "--task", "flying"],
            [
                "--device: expected one of phone",
                "--hours: expected a number",
                "/no/where",
                "--task: expected one of segm",
            ],
        ),
        (["--teacher", "nobody"], ["--teacher: expected none, dinov2-small"]),
        (["--task", "features", "--teacher", "none"], ["learns from a teacher alone"]),
        (["--task", "instance"], ["did you mean 'instance-segmentation'?"]),
    ],
)
def test_answers_that_are_none_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["init", "--data", "shapes", "--yes", "--no-measure", *words])
    except SystemExit as error:
        code = error.code  # type: ignore[assignment]
    error = capsys.readouterr().err
    assert code == 2 and all(text in error for text in said)
    assert not (tmp_path / "recipe.yaml").exists()


@pytest.mark.parametrize(
    "task", ["segmentation", *(pytest.param(name, marks=pytest.mark.slow) for name in ("depth", "classification"))]
)
def test_steps_are_measured_where_the_models_load_and_the_plan_is_printed(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic")
    ResNetModel(small).save_pretrained("student")
    ViT = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=14, image_size=28)
    Dinov2Model(ViT).save_pretrained("dino")
    monkeypatch.setitem(starting.DEVICES, "phone", Size("a phone", str(tmp_path / "student"), 8, 32))
    words = ["mine.yaml", "--data", "shapes", "--device", "phone", "--teacher", str(tmp_path / "dino")]
    words += ["--task", task]
    assert main(["init", *words, "--hours", "0.01", "--yes"]) == 0
    shown = capsys.readouterr().out
    recipe = load_recipe("mine.yaml")
    assert "by steps measured on this machine" in Path("mine.yaml").read_text()
    for text in (
        "student alone",
        "teacher live",
        "cached, whole images",
        "this recipe in all",
        "cankd train mine.yaml",
    ):
        assert text in shown
    steps, batch = recipe.training["max_steps"], recipe.training["per_device_train_batch_size"]
    assert f"plan: {steps:,} steps of {batch} images" in shown
    assert max(len(line) for line in shown.splitlines() if str(tmp_path) not in line) <= 80
    assert main(["init", *words, "--yes", "--force", "--no-measure"]) == 0
    assert "--dry-run measures a step" in capsys.readouterr().out


def test_the_student_may_be_named_and_is_asked_for_where_none_can_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    words = ["--data", "shapes", "--device", "cpu", "--yes"]
    assert main(["init", "far.yaml", *words, "--teacher", "dinov2-small"]) == 0
    *_, student, teacher = " ".join(capsys.readouterr().out.split()).split(" - ")
    assert student.startswith("student.backbone: microsoft/resnet-18 is not here") and "--student FOLDER" in student
    assert teacher.startswith("teacher.model: facebook/dinov2") and "--teacher FOLDER_OR_ID" in teacher
    folder = tmp_path / "my student: a"
    folder.mkdir()
    cfg = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "config.json").write_text(json.dumps({"architecture": "resnet18", "pretrained_cfg": cfg}))
    named = [*words, "--student", str(folder), "--teacher", "none", "--no-measure"]
    assert main(["init", "near.yaml", *named]) == 0
    shown, recipe = capsys.readouterr().out, load_recipe("near.yaml")
    assert recipe.student.backbone == {"pretrained": str(folder), "out_indices": [1, 2, 3, 4]}
    assert recipe.data.image_mean == [0.5] * 3 and "student.backbone:" not in shown and "teacher=null" not in shown
    (folder / "config.json").unlink()
    assert main(["init", "none.yaml", *named]) == 2
    assert "--student: expected a folder with a model and its config.json" in capsys.readouterr().err
