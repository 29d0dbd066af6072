"""A dead, untrained or weak teacher is told once: in the log, the dry run, the result table and the card."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cankd_hf import train
from cankd_hf.cli.report import print_report
from cankd_hf.hub.card import render_card
from cankd_hf.hub.facts import Facts
from cankd_hf.runs.record import Arm, Report
from cankd_hf.teachers.health import dead, untrained
from cankd_hf.teachers.load import load_teacher
from cankd_hf.teachers.teacher import Teacher, TeacherOutput

from .test_commands import RESNET, recipe
from .tiny_trainers import Images, student, teacher, trainer


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.message for r in caplog.records if r.levelno >= logging.WARNING and r.message.startswith("teacher")]


def silenced(kind: str) -> Teacher:
    """A teacher whose maps are constant: everywhere, or over the images only."""
    made = teacher()
    with torch.no_grad():
        embeddings: Any = made.model.embeddings
        embeddings.patch_embeddings.projection.weight.zero_()
        if kind == "everywhere":
            embeddings.position_embeddings.zero_()
    return made


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    ("kind", "said"),
    [("images", "is the same for every image;"), ("everywhere", "is the same for every image and at every position;")],
)
def test_a_dead_teacher_is_told_once(
    kind: str, said: str, batch: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = trainer(tmp_path, Images(8), teacher=silenced(kind), per_device_train_batch_size=batch, max_steps=3)
    made.train()
    found = [message for message in messages(caplog) if "is the same" in message]
    assert len(found) == 1 and said in found[0] and "teacher: its output at" in found[0]
    made.save_model(str(tmp_path / "saved"))
    assert found[0] in json.loads((tmp_path / "saved" / "distillation.json").read_text())["teacher_findings"]
    made.create_model_card()
    made.save_model()
    made.create_model_card()
    assert found[0][1:] in (tmp_path / "README.md").read_text()


def test_what_depends_on_the_image_is_alive() -> None:
    images = torch.rand(2, 3, 8, 8)
    alive = torch.rand(2, 4, 3, 3)
    flat = torch.rand(2, 4, 1, 1).expand(2, 4, 3, 3)
    assert dead("teacher", ["a", "b"], TeacherOutput([alive, alive + 50]), images) == []
    assert (
        "teacher x: its output at b is the same at every position"
        in dead("x", ["a", "b"], TeacherOutput([alive, flat]), images)[0]
    )
    assert dead("teacher", ["a"], TeacherOutput([flat]), torch.ones(2, 3, 8, 8)) == [], "images alike, answers alike"
    assert dead("teacher", ["a"], TeacherOutput([flat[:1, :, :1, :1]]), images[:1]) == [], "too little to judge"


def test_untrained_teachers_are_known_by_their_norms() -> None:
    assert untrained("teacher", teacher()), "random weights of a configuration"
    model = student()
    assert untrained("teacher", load_teacher(model)), "never trained"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.requires_grad_(True).train()
    images = Images(2)
    batch = torch.stack([images[0]["pixel_values"], images[1]["pixel_values"]])
    model(batch, labels=torch.stack([images[0]["labels"], images[1]["labels"]])).loss.backward()
    optimizer.step()
    assert untrained("teacher", load_teacher(model)) == []
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert untrained("teacher", load_teacher(net, taps=["1"]))
    net.train()(batch)  # statistics of images
    assert untrained("teacher", load_teacher(net, taps=["1"])) == []


def test_a_random_teacher_is_told_in_log_dry_run_table_and_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    config = {"model_type": "cankd_fpn", "backbone_config": RESNET, "fpn_channels": 16, "head_channels": 16}
    file = recipe(tmp_path, teacher={"config": config}, baseline=False)
    said = "teacher: its weights are random, never trained"
    assert train.main([file, "--dry-run"]) == 0
    assert capsys.readouterr().out.count(said) == 1
    caplog.clear()
    assert train.main([file]) == 0
    assert capsys.readouterr().out.count(said) == 1 and len(messages(caplog)) == 1
    assert (tmp_path / "run" / "README.md").read_text().count(said[1:]) == 1
    assert json.loads((tmp_path / "run" / "results.json").read_text())["findings"][0].startswith(said)
    # A teacher that the run trains first is not random when it teaches.
    fit = recipe(tmp_path, output_dir=str(tmp_path / "fit"))
    assert train.main([fit, "--dry-run"]) == 0
    assert "are random" not in capsys.readouterr().out


def test_a_teacher_below_the_student_is_told_in_table_and_card(capsys: pytest.CaptureFixture[str]) -> None:
    def report(teacher: float, alone: float | None, distilled: float) -> Report:
        scores = {"teacher": teacher, "student alone": alone, "student distilled": distilled}
        arms = [Arm(name, "run", {"miou": score}, 10, 5) for name, score in scores.items() if score is not None]
        return Report("segmentation", "miou", "test", arms, "run")

    below = report(0.3, 0.5, 0.4)
    assert below.weak_teachers() == ["teacher: its miou of 0.3000 is worse than the 0.5000 of the student alone"]
    assert report(0.6, 0.5, 0.7).weak_teachers() == []
    assert "of the student distilled" in report(0.6, None, 0.7).weak_teachers()[0]
    below.findings = below.weak_teachers()
    results = {
        "arms": [vars(arm) for arm in below.arms],
        "metric": "miou",
        "split": "test",
        "findings": below.findings,
    }
    card = render_card(Facts({}, {"task": "segmentation"}, results, {}), "me/student")
    assert "- Teacher: its miou of 0.3000 is worse than the 0.5000 of the student alone." in card
    with pytest.raises(FileNotFoundError):  # no student in the folder, but the warning comes before it
        print_report(below)
    assert capsys.readouterr().out.count("Warning: teacher: its miou") == 1
