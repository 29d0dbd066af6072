"""Instance segmentation goes through every command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from cankd_hf import CanKDConfig, CanKDTrainer, LossTerm, evaluate, export, label, train
from cankd_hf.config.data import DataConfig
from cankd_hf.config.student import StudentConfig
from cankd_hf.data.common.seeds import seeded
from cankd_hf.data.detection.load import load_detection
from cankd_hf.tasks import InstanceSegmentationTask
from tests.models.kinds import RESNET
from tests.processes import run_two

from .kinds import CONVNEXT, SIZES, generated, student

SMALL = {"fpn_channels": 8, "head_channels": 16, "score_threshold": 0.01}
FPN = {"head": "faster_rcnn", "fpn_channels": 8, "head_channels": 16, "score_threshold": 0.0, "max_detections": 20}
DATA = {"path": "shapes", "generated": {**SIZES, "size": 48}, "test_split": "test", "image_size": [64, 64]}


def recipe(folder: Path, **changes: Any) -> Path:
    """A distilled student of a teacher with masks."""
    settings: dict[str, Any] = {
        "task": "instance-segmentation",
        "output_dir": str(folder / "run"),
        "data": DATA,
        "student": {"backbone": RESNET, "fpn": SMALL},
        "teacher": {
            "config": {"model_type": "cankd_fpn", "head": "cascade_rcnn", "masks": True, "backbone_config": RESNET}
            | {"fpn_channels": 8, "head_channels": 16}
        },
        "distill": {"terms": [{"loss": "cankd", "weight": 0.1}]},
        "training": {
            **{"max_steps": 2, "learning_rate": 0.01, "per_device_train_batch_size": 4, "logging_steps": 1},
            **{"eval_strategy": "steps", "eval_steps": 2, "use_cpu": True, "disable_tqdm": True},
        },
        **changes,
    }
    file = folder / "instances.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("instances")
    assert train.main([str(recipe(folder))]) == 0
    return folder / "run"


def test_a_run_is_scored_drawn_and_described(finished: Path, tmp_path: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    scores = results["arms"][-1]["scores"]
    assert {"mask_ap", "mask_ap50", "ap", "mask_ap_star", "ap_star"} <= set(scores)
    with Image.open(finished / "predictions.png") as picture:
        assert picture.size[0] > 300
    card = (finished / "README.md").read_text()
    for words in ("finds 5 kinds of things and outlines each", "pipeline_tag: image-segmentation", "type: mask_map"):
        assert words in card, card
    assert evaluate.main([str(finished), "--json", str(tmp_path / "scores.json")]) == 0
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["mask_ap"] == pytest.approx(scores["mask_ap"], abs=1e-6)


@pytest.mark.slow
def test_the_code_of_the_card_runs_without_cankd_hf(finished: Path, tmp_path: Path) -> None:
    config = json.loads((finished / "config.json").read_text())
    assert config["architectures"] == ["FPNForInstanceSegmentation"] and config["masks"] is True
    code, _ = InstanceSegmentationTask.usage(config, str(finished))
    Image.effect_noise((90, 60), 90).convert("RGB").save(tmp_path / "photo.jpg")
    script = 'import sys\nsys.modules["cankd_hf"] = None\n' + code
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=240, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "60, 90])" in done.stdout


def naive_ap50(found: dict[str, Tensor], truth: dict[str, Tensor]) -> int:
    """How many objects are found with the right class and an overlap of more than a half."""
    hits = 0
    for mask, kind in zip(truth["masks"], truth["labels"], strict=True):
        both = (found["masks"] & mask).flatten(1).sum(1) / (found["masks"] | mask).flatten(1).sum(1).clamp(min=1)
        hits += int(((both > 0.5) & (found["labels"] == kind)).any())
    return hits


def test_pictures_show_masks() -> None:
    task, data = generated()
    sample = data.eval[0]
    truth = task.truth(sample)
    assert truth["masks"].shape == (len(truth["labels"]), 64, 64)
    answer = {**truth, "scores": torch.ones(len(truth["labels"]))}
    assert naive_ap50(answer, truth) == len(truth["labels"])
    painted = task.paint(np.zeros((64, 64, 3), np.float32), answer, truth)
    assert painted.dtype == np.uint8
    rows, columns = painted.shape[0] // 64, painted.shape[1] // 64
    inside = truth["masks"].any(0).numpy().repeat(rows, 0).repeat(columns, 1)
    assert (painted[inside].max(-1) > 20).mean() > 0.9 and (painted[~inside].max(-1) > 20).mean() < 0.3
    assert task.paint(np.zeros((64, 64, 3), np.float32), {k: v[:0] for k, v in answer.items()}, truth).max() == 0


def test_masks_of_other_loaders_are_scored_at_the_size_of_the_data_set() -> None:
    """Labels of a user's own data set, which bring no outlines, in a padded batch of resized pictures."""
    task, data = generated(generated={**SIZES, "size": 32}, image_size=[64, 64])
    items = [data.eval[index] for index in range(3)]
    wide = {"pixel_values": torch.zeros(3, 96, 80), "labels": None}
    model = student("faster_rcnn", id2label=task.id2label)
    scored = []
    for outlined in (True, False):
        labels = [{k: v for k, v in one["labels"].items() if outlined or k != "outlines"} for one in items]
        batch = task.collate([{**one, "labels": label} for one, label in zip(items, labels, strict=True)] + [wide])
        batch = {"pixel_values": batch["pixel_values"][:3], "labels": batch["labels"][:3]}
        assert batch["labels"][0]["masks"].shape[1:] == (96, 80)
        boxes = [own["boxes"] for own in batch["labels"]]
        count = max(map(len, boxes))
        logits, places = torch.full((3, count, 5), -1e4), torch.zeros(3, count, 4)
        masks = torch.full((3, count, 28, 28), 5.0)
        for row, own in enumerate(batch["labels"]):
            logits[row, range(len(boxes[row])), own["class_labels"]] = 2.0
            places[row, : len(boxes[row])] = boxes[row]
        outputs = {"logits": logits, "pred_boxes": places, "pred_masks": masks}
        found = task.statistics({"outputs": outputs}, batch, model)
        scored.append(task.scores({name: values.numpy() for name, values in found.items()}))
    assert 0.1 < scored[0]["mask_ap50"] < scored[0]["ap50"] == 1, "boxes are right, masks that fill them are not"
    assert scored[1] == pytest.approx(scored[0], nan_ok=True, abs=0.02)


def distilled(folder: Path, batch: int) -> tuple[CanKDTrainer, dict[str, float], list[float]]:
    """A trainer after two steps with CanKD, its scores on all images, and a weight.

    The losses of two-stage heads are means over the samples of a process, as torchvision's, and samples are random:
    here all images of the training set are one, and all proposals are sampled.
    """
    task, data = generated(color_jitter=0.0)
    with seeded(0):
        learner, teacher = (task.build_student(StudentConfig(backbone=CONVNEXT, fpn=FPN)) for _ in range(2))
    for part in (learner.head.rpn, learner.head.roi_heads):
        part.fg_bg_sampler.batch_size_per_image = 10**6
        part.fg_bg_sampler.positive_fraction = 0.5
    args = CanKDConfig(
        str(folder),
        max_steps=2,
        learning_rate=0.01,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    made = CanKDTrainer(
        *(learner, teacher, args),
        terms=[LossTerm("cankd")],
        task=task,
        train_dataset=[data.train[0] for _ in range(8)],
        eval_dataset=data.eval,
    )
    made.train()
    scores = made.evaluate()
    names = [name for name in scores if name.startswith(("eval_mask_a", "eval_ap"))]
    weight = next(p for name, p in made.student.named_parameters() if "mask_branch" in name)
    return made, {name: scores[name] for name in names}, weight.detach().flatten()[:50].tolist()


def test_one_step_with_cankd_moves_the_mask_branch(tmp_path: Path) -> None:
    made, scores, weight = distilled(tmp_path, batch=4)
    assert {"eval_mask_ap", "eval_ap"} <= set(scores) and made.task.name == "instance-segmentation"
    with seeded(0):
        before = made.task.build_student(StudentConfig(backbone=CONVNEXT, fpn=FPN))
    first = next(p for name, p in before.named_parameters() if "mask_branch" in name).detach().flatten()[:50]
    assert 1e-3 < (first - torch.tensor(weight)).abs().max() < 1
    assert made.distiller.placed, "CanKD compares maps"


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    run_two(Path(__file__).with_name("two_processes.py"), tmp_path)
    scores, weight = json.loads((tmp_path / "found.json").read_text())
    _, wanted, alone = distilled(tmp_path / "one", batch=4)
    torch.testing.assert_close(torch.tensor(weight), torch.tensor(alone), atol=1e-5, rtol=1e-3)
    assert scores == pytest.approx(wanted, rel=1e-3, abs=1e-3, nan_ok=True)


def test_a_teacher_labels_masks(finished: Path, tmp_path: Path) -> None:
    """What `cankd label` writes is read again as masks, those that it drew."""
    (tmp_path / "bare").mkdir()
    random = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(random.integers(0, 255, (50, 70, 3), np.uint8)).save(tmp_path / f"bare/{number}.png")
    made = tmp_path / "labelled"
    options = ["--threshold", "0.05", "--output", str(made)]
    assert label.main([str(finished), str(tmp_path / "bare"), *options]) == 0
    lines = [json.loads(line) for file in made.rglob("metadata.jsonl") for line in file.read_text().splitlines()]
    written = [line["objects"] for line in lines]
    assert len(written) == 3 and all(len(one["segmentation"]) == len(one["bbox"]) for one in written)
    assert sum(len(one["bbox"]) for one in written)
    config = DataConfig(path=str(made), train_split="train[:2]", eval_split="train[2:]", check="none")
    data = load_detection(config, masked=True)
    for index in range(2):
        objects = data.train.raw(index).label
        assert objects.masks().shape[1:] == (50, 70) and len(objects.boxes)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["faster_rcnn", "cascade_rcnn"])
def test_onnx_gives_what_pytorch_gives(head: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    student = {"backbone": RESNET, "fpn": {**SMALL, "head": head}}
    assert train.main([str(recipe(tmp_path, student=student, teacher=None, distill={}))]) == 0
    folder = tmp_path / "out"
    assert export.main([str(tmp_path / "run"), "--size", "64", "96", "--no-latency", "--output", str(folder)]) == 0
    report = json.loads((folder / "export.json").read_text())
    assert report["outputs"] == ["scores", "labels", "boxes", "masks"]
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    images = torch.randn(2, 3, 64, 96)
    scores, labels, _, masks = session.run(None, {"pixel_values": images.numpy()})
    with torch.no_grad():
        wanted = InstanceSegmentationTask.load(tmp_path / "run").eval()(pixel_values=images)
    rated, kinds = wanted.logits.sigmoid().max(-1)
    np.testing.assert_allclose(scores, rated.numpy(), atol=1e-3)
    same = (labels == kinds.numpy()) & (scores > 0)
    assert same.sum() > 0.9 * (scores > 0).sum() > 0
    apart = np.abs(masks - wanted.pred_masks.numpy()).reshape(*scores.shape, -1).max(-1)
    assert np.median(apart[same]) < 1e-3
