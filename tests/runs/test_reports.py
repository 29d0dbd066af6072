"""Scores of single images, confusion matrices, `report.html`, and pictures of predictions while a student trains."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cankd_hf.figures.predictions import KEPT, PredictionsCallback
from cankd_hf.metrics.boxes import match_boxes
from cankd_hf.metrics.detection import detection_statistics
from cankd_hf.runs.details import confused, order
from cankd_hf.runs.recipe import parse_recipe
from cankd_hf.runs.run import run
from cankd_hf.tasks import TASKS
from cankd_hf.tasks.base import Task
from tests.processes import run_two
from tests.training import tiny_trainers as tiny

BACKBONE = {"model_type": "convnext", "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}


def box(*corners: float) -> list[float]:
    return list(corners)


def test_boxes_are_matched_in_their_class_first_and_then_in_any() -> None:
    found = {
        "scores": torch.tensor([0.9, 0.8, 0.7, 0.6, 0.1]),
        "labels": torch.tensor([0, 1, 1, 0, 0]),
        "boxes": torch.tensor(
            [box(0, 0, 10, 10), box(20, 20, 30, 30), box(40, 40, 50, 50), box(60, 60, 70, 70), box(0, 1, 10, 10)]
        ),
    }
    there = {
        "class_labels": torch.tensor([0, 0, 1, 0, 0]),
        "boxes": torch.tensor(
            [box(0, 0, 10, 10), box(20, 20, 30, 31), box(40, 40, 50, 51), box(80, 80, 90, 90), box(60, 60, 90, 70)]
        ),
        "iscrowd": torch.tensor([0, 0, 0, 0, 1]),
    }
    nothing = {key: value[:0] for key, value in found.items()}
    of_crowd = {key: value[4:] for key, value in there.items()}
    not_counted = {**there, "image_id": torch.tensor([-1])}
    tables = detection_statistics([found, nothing, nothing], [there, not_counted, of_crowd])
    made = match_boxes(tables.numpy(), 2)
    # two are right; one is another class; the one on the crowd counts for nothing; 0.7 is the last that is right
    assert made.threshold == pytest.approx(0.7) and made.confusion.tolist() == [[1, 1, 1], [0, 1, 0], [0, 0, 0]]
    assert made.f1[0] == pytest.approx(2 * 2 / (3 + 4)) and np.isnan(made.f1[1]) and made.f1[2] == 1.0
    assert match_boxes(tables.numpy()[1:], 2).threshold == 0.3


def test_the_worst_come_first_and_images_without_a_score_last() -> None:
    images = {"values": [0.5, None, 0.1, 0.9], "greater_is_better": True}
    assert order(images) == [2, 0, 3] and order({**images, "greater_is_better": False}) == [3, 0, 2]
    matrix = {"names": ["a", "b"], "counts": [[6, 2], [0, 0]]}
    assert confused(matrix) == [("a", "b", 2, 0.25)]


class _Page(HTMLParser):
    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.pictures: list[str] = []
        self.tags: set[str] = set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        self.links += [value for key, value in attrs if key in ("href", "src") and value]
        self.ids += [given["id"] or ""] if "id" in given else []
        self.pictures += [given["src"] or ""] if tag == "img" else []


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watched") / "run"
    content: dict[str, Any] = {
        "output_dir": str(folder),
        "baseline": True,
        "data": {"path": "shapes", "generated": {"train": 8, "validation": 4, "test": 40, "size": 32}},
        "student": {"backbone": BACKBONE, "fpn": {"fpn_channels": 16, "head_channels": 16}},
        "teacher": {"config": tiny.dinov2()},
        "distill": {"terms": [{"loss": "cankd"}]},
        "training": {"max_steps": 2, "per_device_train_batch_size": 4, "eval_strategy": "steps", "eval_steps": 1}
        | {"logging_steps": 1, "disable_tqdm": True, "save_strategy": "no", "use_cpu": True},
    }
    content["data"]["test_split"] = "test"
    run(parse_recipe(json.dumps(content), []))
    return folder


def test_a_run_ends_with_a_page_that_holds_all_it_shows(finished: Path) -> None:
    file = finished / "report.html"
    page, text = _Page(file), file.read_text(encoding="utf-8")
    assert not page.tags & {"script", "link", "iframe"}
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} == set(page.ids)
    assert file.stat().st_size < 2_000_000
    jpegs = [source for source in page.pictures if source.startswith("data:image/jpeg")]
    assert len(jpegs) == 24 * 4  # image, truth, two students; of 40 images
    shown = Image.open(io.BytesIO(base64.b64decode(jpegs[0].partition(",")[2])))
    assert shown.width == 240
    assert "Is it working?" in text and "Confusion matrix" in text and "student distilled" in text
    details = json.loads((finished / "details.json").read_text())
    values = np.array(details["images"]["values"])
    names = re.findall(r"<figcaption><b>(.*?)</b>", text)
    assert names[:18] == [details["images"]["names"][index] for index in values.argsort(kind="stable")[:18]]
    assert len(set(names)) == 24
    assert len(values) == 40 and details["split"] == "test"
    # all pixels are counted, and the scores follow from the matrix
    counts = np.array(details["confusion"]["counts"])
    assert counts.sum() == 40 * 32 * 32
    scores = json.loads((finished / "arm.json").read_text())["scores"]
    assert counts.trace() / counts.sum() == pytest.approx(scores["pixel_accuracy"])


def test_pictures_are_drawn_after_each_evaluation(finished: Path) -> None:
    for folder in (finished, finished / "alone"):
        assert sorted(file.name for file in (folder / "predictions").iterdir()) == ["step_1.png", "step_2.png"]
    with (
        Image.open(finished / "predictions" / "step_1.png") as first,
        Image.open(finished / "predictions.png") as last,
    ):
        assert first.size[0] < last.size[0]  # that at the end has all models
    assert (finished / "alone" / "predictions.png").read_bytes() == (
        finished / "alone" / "predictions" / "step_2.png"
    ).read_bytes()


def test_drawing_changes_no_training_and_keeps_a_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cankd_hf.figures.predictions.KEPT", 3)
    made = []
    for draws in (True, False):
        trainer = tiny.trainer(
            tmp_path / str(draws),
            data=tiny.Images(16, noisy=True),
            model=tiny.student(dropout=0.3),
            eval_dataset=tiny.Images(4),
            eval_strategy="steps",
            eval_steps=1,
            max_steps=5,
        )
        if draws:
            trainer.add_callback(PredictionsCallback(trainer, images=2))
        torch.manual_seed(5)
        trainer.train()
        made.append((tiny.weights(trainer), torch.get_rng_state()))
        trainer.evaluate()  # no part of the training
    assert tiny.largest_difference(made[0][0], made[1][0]) == 0 and torch.equal(made[0][1], made[1][1])
    kept = sorted(file.name for file in (tmp_path / "True" / "predictions").iterdir())
    assert kept == ["step_1.png", "step_4.png", "step_5.png"] and KEPT == 20
    assert not (tmp_path / "False" / "predictions.png").exists()


def test_trackers_get_them_and_a_task_without_answers_shows_its_maps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TASKS["segmentation"], "pictured", False)
    settings = {"eval_dataset": tiny.Images(2), "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    trainer = tiny.trainer(tmp_path, report_to="tensorboard", terms=tiny.terms(), **settings)
    trainer.add_callback(PredictionsCallback(trainer))
    trainer.train()
    (folder,) = {file.parent for file in tmp_path.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    assert [image.step for image in events.Images("predictions")] == [1]
    with Image.open(tmp_path / "predictions.png") as shown:
        assert shown.size == (events.Images("predictions")[0].width, events.Images("predictions")[0].height)


def test_a_task_that_says_nothing_of_images_needs_nothing() -> None:
    assert not Task.pictured and TASKS["segmentation"].pictured and TASKS["detection"].pictured
    plain: Any = TASKS["features"]()
    assert plain.image_scores(None) is None and plain.confusion(None, None) is None and plain.tally({}, {}) is None


TWO = """
import json, sys
from pathlib import Path
from tests.processes import leave_together
from tests.training import tiny_trainers as tiny
folder = Path(sys.argv[1])
trainer = tiny.trainer(folder, eval_dataset=tiny.Images(7), per_device_eval_batch_size=2)
with trainer.keeping_details() as details:
    trainer.evaluate()
rank = trainer.args.process_index
found = {"images": trainer.task.image_scores(details.statistics).values.tolist(), "tally": details.tally.tolist()}
(folder / f"details{rank}.json").write_text(json.dumps(found))
leave_together(folder, rank)
"""


@pytest.mark.slow
def test_two_processes_say_the_same_of_each_image_as_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TWO)
    run_two(script, tmp_path)
    trainer = tiny.trainer(tmp_path, eval_dataset=tiny.Images(7), per_device_eval_batch_size=2)
    with trainer.keeping_details() as details:
        trainer.evaluate()
    one = trainer.task.image_scores(details.statistics)
    assert one is not None and details.tally is not None
    for rank in (0, 1):
        found = json.loads((tmp_path / f"details{rank}.json").read_text())
        assert found["images"] == pytest.approx(one.values.tolist(), abs=1e-9)
        assert found["tally"] == details.tally.tolist()
