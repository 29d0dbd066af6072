"""Is it working? Four seeded runs get their four verdicts, in Python and by recipe, and measuring changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from cankd_hf import CanKDTrainer, LossTerm, Objective, train
from cankd_hf.losses.cankd import CanKDLoss
from cankd_hf.losses.instance_mse import InstanceMSELoss
from cankd_hf.runs.build import build_trainer
from cankd_hf.runs.recipe import load_recipe
from cankd_hf.tasks import TASKS
from cankd_hf.teachers.load import load_teacher
from cankd_hf.teachers.teacher import Teacher
from cankd_hf.training.monitoring.probe import cells, knn_accuracy
from cankd_hf.training.monitoring.working import BROKEN, LEARNING, PLATEAU, SHORTCUT, judge

from .test_commands import RESNET, recipe
from .test_teacher_health import silenced
from .tiny_trainers import Images, largest_difference, student, teacher, trainer, weights

CANKD = [LossTerm(loss="cankd", weight=10.0)]
SETTINGS = {"max_steps": 20, "logging_steps": 20, "per_device_train_batch_size": 4, "optim": "adamw_torch"}


def trained() -> Teacher:
    """A teacher whose norms are not those of new weights."""
    model = teacher().model
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name:
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return load_teacher(model)


def ran(folder: Path, **settings: Any) -> CanKDTrainer:
    usual = {"teacher": trained(), "eval_dataset": Images(8), "learning_rate": 5e-3, **SETTINGS}
    made = trainer(folder, **{**usual, **settings})
    made.train()
    return made


def held(made: CanKDTrainer) -> list[dict[str, float]]:
    return [entry for entry in made.state.log_history if "held_loss" in entry]


FROZEN = Objective(0.0, CANKD, frozen=["backbone", "neck", "head"])


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (LEARNING, {"terms": CANKD, "task_weight": 0.0}),
        (PLATEAU, {"terms": CANKD, "learning_rate": 0.0}),
        (SHORTCUT, {"objective": FROZEN, "terms": None, "learning_rate": 2e-2}),
        (BROKEN, {"teacher": None, "terms": CANKD}),
    ],
)
def test_four_runs_get_their_four_verdicts(
    kind: str, settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if kind == BROKEN:
        settings = {**settings, "teacher": silenced("images")}
    made = ran(tmp_path, **settings)
    verdict = made.working.verdict()
    assert verdict.kind == kind, verdict.line
    lines = [r.message for r in caplog.records if r.message.startswith("Is it working?")]
    assert lines[-1] == f"Is it working? {verdict.line}" and len(set(lines)) == len(lines)
    first, *_, last = held(made)
    assert [entry["step"] for entry in held(made)] == [0, 10, 20]
    moved = abs(last["held_cka"] - first["held_cka"])
    if kind == SHORTCUT:
        assert moved < 1e-6 and last["held_loss"] < 0.85 * first["held_loss"]
        assert last["held_loss"] < last["held_plain"], "the block's part of it"
    if kind == PLATEAU:
        assert first["held_loss"] == last["held_loss"] and moved == 0
    if kind == LEARNING:
        assert moved > 0.01 and "raw CKA" in verdict.line and "held-out distillation loss" in verdict.line
    if kind == BROKEN:
        assert any("is the same for every image" in finding for finding in made.health.findings)
    made.save_model(str(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved" / "distillation.json").read_text())["working"]
    assert saved == made.working.facts() and saved["verdict"] == kind
    assert {**saved, **verdict.facts()} == saved
    assert ("weights" in saved) == (kind in (PLATEAU, BROKEN)), "a share needs a task, and taps that train"


TRAINING = {
    **{"max_steps": 20, "per_device_train_batch_size": 4, "logging_steps": 20, "save_strategy": "no"},
    **{"use_cpu": True, "disable_tqdm": True, "learning_rate": 5e-3},
}
TEACHER = {"model_type": "cankd_fpn", "backbone_config": RESNET, "fpn_channels": 16, "head_channels": 16}
# A frozen student by recipe: its backbone, which is compared, learns at a rate next to nothing.
BY_RECIPE: dict[str, dict[str, Any]] = {
    LEARNING: {},
    PLATEAU: {"training": {**TRAINING, "learning_rate": 0.0}},
    SHORTCUT: {
        "training": {**TRAINING, "backbone_lr_scale": 1e-9, "learning_rate": 5e-2},
        "student": {"backbone": RESNET, "fpn": {"fpn_channels": 8, "head_channels": 8}, "taps": ["backbone"]},
    },
    BROKEN: {"teacher": {"config": TEACHER}},
}


@pytest.mark.parametrize("kind", [LEARNING, PLATEAU, SHORTCUT, BROKEN])
def test_four_recipes_get_their_four_verdicts(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usual = {"baseline": False, "distill": {"terms": [{"loss": "cankd", "weight": 10}]}, "training": TRAINING}
    assert train.main([recipe(tmp_path, **{**usual, **BY_RECIPE[kind]})]) == 0
    arms = json.loads((tmp_path / "run" / "results.json").read_text())["arms"]
    found = arms[-1]["working"]
    assert found["verdict"] == kind, found
    assert all(arm["working"] == {} for arm in arms[:-1]), "a teacher has no teacher"
    assert capsys.readouterr().out.count(f"Is it working? {found['line']}") == 1
    card = (tmp_path / "run" / "README.md").read_text()
    assert "Is it working?" in card and found["line"][:20] in card


class Labelled(Dataset):
    """Images of two classes that differ in their mean."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(index))
        return {"pixel_values": image + 2.0 * (index // 2 % 2), "labels": torch.full((64, 64), index // 2 % 2)}


def test_a_run_without_labels_is_probed_where_some_images_have_them(tmp_path: Path) -> None:
    settings = {"per_device_train_batch_size": 16, "max_steps": 450, "check_images": 2, "terms": CANKD}
    made = trainer(tmp_path, task_weight=0.0, teacher=trained(), eval_dataset=Labelled(), **{**SETTINGS, **settings})
    made.working.on_train_begin(made.args, _state(made, 450), made.control)
    found = made.working._measured()
    assert 0.9 < found["held_probe"] <= 1
    assert sum(len(labels) for _, labels in made.working._probed) >= 20
    taught = trainer(tmp_path, task_weight=1.0, teacher=trained(), eval_dataset=Labelled(), **settings)
    taught.working.on_train_begin(taught.args, _state(taught, 450), taught.control)
    assert "held_probe" not in taught.working._measured(), "its score is measured anyway"


def _state(made: CanKDTrainer, steps: int) -> Any:
    made.state.max_steps = steps
    return made.state


def test_the_probe_is_that_of_its_neighbours() -> None:
    features = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1.0], [0.1, 0.9]]).repeat(3, 1)
    labels = torch.tensor([0, 0, 1, 1]).repeat(3)
    assert knn_accuracy((features, labels), (features, labels)) == 1.0
    assert knn_accuracy((features, labels), (features, 1 - labels)) == 0.0
    assert torch.tensor(knn_accuracy((features, labels), (features, labels), ignore=(0, 1))).isnan()
    masks = torch.arange(2).repeat_interleave(32).expand(1, 64, 64)  # left 0, right 1
    found, of_cells = cells(torch.arange(8.0).view(1, 2, 2, 2), masks)
    assert found.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]] and of_cells.tolist() == [0, 1, 0, 1]
    assert cells(torch.ones(3, 2, 4, 4), torch.arange(3))[0].shape == (3, 2)


def test_measuring_changes_nothing(tmp_path: Path) -> None:
    """Weights, BatchNorm statistics and random numbers are those of a run that is not judged."""
    settings = {"max_steps": 12, "terms": CANKD, "teacher": trained()}
    made = [
        ran(
            tmp_path, data=Images(16, noisy=True), model=student(norm="batch", dropout=0.1), check_images=n, **settings
        )
        for n in (0, 2)
    ]
    assert largest_difference(*(weights(one) for one in made)) == 0
    assert held(made[0]) == [] and len(held(made[1])) == 3
    assert "check_images is 0" in made[0].working.verdict().line


def test_measuring_takes_no_line_of_the_log_away(tmp_path: Path) -> None:
    made = ran(tmp_path, terms=CANKD, max_steps=12, logging_steps=1)
    measured = {entry["step"] for entry in held(made)}
    assert measured & {*range(1, 12)}, "else nothing is measured at a step that is logged"
    assert [entry["step"] for entry in made.state.log_history if "loss" in entry] == [*range(1, 13)]


def test_a_resumed_run_comes_to_the_same_verdict(tmp_path: Path) -> None:
    whole = ran(tmp_path / "a", save_strategy="steps", save_steps=10)
    resumed = trainer(tmp_path / "b", teacher=trained(), eval_dataset=Images(8), **{**SETTINGS, "learning_rate": 5e-3})
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-10"))
    assert [entry["step"] for entry in held(resumed)] == [0, 10, 20]
    assert resumed.working.verdict() == whole.working.verdict()


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return (Images(4)[index] for index in range(4))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"eval_dataset": None}, "there is no evaluation set"),
        ({"eval_dataset": Stream()}, "the evaluation set is a stream"),
        ({"eval_dataset": Images(1)}, "the evaluation set has one image"),
        ({"max_steps": 2}, "a run of 2 steps is too short"),
    ],
)
def test_why_a_run_is_not_judged(settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    made = trainer(tmp_path, **{"eval_dataset": Images(8), **SETTINGS, **settings})
    made.working.on_train_begin(made.args, _state(made, made.args.max_steps), made.control)
    assert reason in made.working.reason and not made.working._due


def test_a_loss_without_its_branch_is_the_distance_of_the_maps(tmp_path: Path) -> None:
    student_map, teacher_map = torch.randn(2, 8, 6, 6), torch.randn(2, 8, 6, 6)
    loss = CanKDLoss(8)
    start = loss(student_map, teacher_map)
    torch.nn.init.ones_(loss.output_norm.weight)  # type: ignore[union-attr]
    assert (loss(student_map, teacher_map) - start).abs() > 0.01
    assert torch.allclose(loss.without_branch(student_map, teacher_map), start)  # type: ignore[arg-type]
    assert CanKDLoss(8, residual=False).without_branch(student_map, teacher_map) is None
    assert InstanceMSELoss(8).without_branch(student_map, teacher_map) is None


def history(**values: list[float]) -> list[dict[str, Any]]:
    count = len(next(iter(values.values())))
    return [{"step": 10 * n} | {f"held_{key}": found[n] for key, found in values.items()} for n in range(count)]


def test_verdicts_of_made_up_histories() -> None:
    rising, still = [0.2, 0.4, 0.5, 0.55], [0.2, 0.2, 0.2, 0.2]
    falling = [10.0, 8.0, 7.0, 6.0]
    assert judge(history(loss=falling, cka=rising)).kind == LEARNING
    assert judge(history(loss=falling, cka=still)).kind == SHORTCUT
    assert judge(history(loss=falling, cka=still, correlation=rising)).kind == LEARNING, "of maps without a connector"
    assert judge(history(loss=falling, plain=[10.0, 10.0, 9.9, 9.9], cka=rising)).kind == SHORTCUT
    converged = judge(history(loss=[10.0, 6.0, 6.0, 6.0, 6.0], cka=[0.2, 0.5, 0.5, 0.5, 0.5]))
    assert converged.kind == PLATEAU and "it learnt" in converged.line
    assert judge(history(loss=falling)).kind == LEARNING, "logits: there are no maps"
    assert judge(history(loss=[10.0] * 4, cka=still)).kind == PLATEAU
    assert judge(history(loss=falling[:2], cka=rising[:2])).kind is None, "too early"
    assert judge(history(loss=falling, cka=rising), ["teacher: dead"]).kind == BROKEN
    worse = history(loss=falling, cka=rising)
    worse[0]["eval_miou"], worse[-1]["eval_miou"] = 0.5, 0.4
    assert "its score is not above that of its start" in judge(worse, metric="miou").line
    assert "not above" not in judge(worse, metric="miou", greater_is_better=False).line


def test_a_recipe_without_labels_is_probed_on_the_masks_of_its_held_out_images(tmp_path: Path) -> None:
    data = {"path": "shapes", "generated": {"train": 80, "validation": 24, "size": 64}, "crop_size": [64, 64]}
    backbone = {**RESNET, "out_features": ["stage2", "stage3"]}
    file = recipe(
        tmp_path,
        **{"task": "features", "data": data, "student": {"backbone": backbone}, "teacher": {"config": backbone}},
        distill={"task_weight": 0, "terms": [{"loss": "instance_mse"}]},
        training={**TRAINING, "check_images": 4},
        baseline=False,
    )
    read = load_recipe(file)
    task, found = TASKS["features"].from_data(read.data, labelled=False)
    made = build_trainer(read, task, found, tmp_path)
    made.working.on_train_begin(made.args, _state(made, 2000), made.control)
    assert 0 < made.working._measured()["held_probe"] < 1
    assert torch.equal(found.eval[3]["pixel_values"], found.probe[3]["pixel_values"]) and "labels" in found.probe[3]
