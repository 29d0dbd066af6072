"""Task and terms that fight: the angle is right, a term is turned down and up, and nothing changes where it is off."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset

from cankd_hf import CanKDTrainer, LossTerm, Objective
from cankd_hf.config.distill import DistillConfig, Guard, Share
from cankd_hf.config.parts import phase_parts
from cankd_hf.errors import InputError
from cankd_hf.hub.files import read_json
from cankd_hf.names import DISTILLER_FILE
from cankd_hf.runs.recipe import load_recipe, parse_recipe
from cankd_hf.runs.run import run
from cankd_hf.training.conflict import COUNT, FACTOR, IMAGES, LAYER, Conflict, told
from cankd_hf.training.conflict_watch import hold_out
from cankd_hf.training.predicting import Answers

from .tiny_trainers import Images, largest_difference, student, teacher, trainer, weights

PAIR = [[-1, -1]]


class Away(nn.Module):
    """A loss that falls as the student's map goes away from the teacher's."""

    def forward(self, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        return -F.smooth_l1_loss(ours, theirs)


def watched(folder: Path, guard: Guard | None, data: Any = None, **settings: Any) -> CanKDTrainer:
    given = settings.pop("terms", [LossTerm(loss="mse", weight=2.0, pairs=PAIR)])
    return trainer(folder, data or Images(16), terms=None, objective=Objective(1.0, given, guard=guard), **settings)


def taken(guard: Guard, cosines: list[float], layer: float = 1.0) -> list[float]:
    """The factor of a term after each of the measurements, none of them smoothed."""
    term = LossTerm(loss="mse")
    conflict, found = Conflict([term], guard), []
    state = conflict.get_buffer("of_mse")
    for cosine in cosines:
        state[COUNT] = 0
        conflict._take("mse", torch.tensor([2 * cosine, 2.0, layer]), held=False)
        found.append(state[FACTOR].item())
    return found


def test_a_term_is_halved_while_it_fights_and_doubled_while_it_agrees() -> None:
    guard = Guard(angle=-0.1, patience=3, floor=0.2)
    assert taken(guard, [-0.5] * 7) == [1, 1, 0.5, 0.25, pytest.approx(0.2), pytest.approx(0.2), pytest.approx(0.2)]
    assert taken(guard, [-0.5, -0.5, 0.5, -0.5, -0.5, 0.5]) == [1.0] * 6  # never for long
    assert taken(guard, [-0.5] * 3 + [-0.097] * 6) == [1, 1, *[0.5] * 7]  # neither: it stays
    assert taken(guard, [-0.5] * 4 + [0.5] * 5) == [1, 1, 0.5, 0.25, 0.25, 0.25, 0.5, 1.0, 1.0]
    assert taken(guard, [0.5] * 3, layer=-0.5) == [1, 1, 0.5]  # the lower one counts
    state = Conflict([LossTerm(loss="mse")], guard)
    state._take("mse", torch.tensor([0.0, 0.0, 0.0]), held=False)  # no image has labels
    assert state.get_buffer("of_mse")[COUNT] == 0 and state.logged() == {"turned_down/mse": 1.0}


def test_the_angle_and_the_share_are_those_of_the_gradients(tmp_path: Path) -> None:
    made = watched(tmp_path, Guard(floor=1.0), max_steps=1, learning_rate=0.0)
    made.train()
    distiller = made.distiller.train()
    batch = made._prepare_inputs(next(iter(made.get_train_dataloader())))
    outputs = made.source(batch)
    task = distiller.student(pixel_values=batch["pixel_values"], labels=batch["labels"]).loss
    maps = distiller.taps.collect(tuple(batch["pixel_values"].shape[-2:]))
    ((_, value),) = distiller.values(distiller.connect(maps, outputs), Answers(distiller.student), outputs)
    tap = maps[-1] if maps[-1]._base is None else maps[-1]._base
    both = [torch.autograd.grad(loss, tap, retain_graph=True)[0] for loss in (value, task)]
    layers = [torch.einsum("bchw,bdhw->cd", gradient, maps[-1]).flatten() for gradient in both]
    ours, theirs = (gradient.flatten(1) for gradient in both)
    logged, state = made.state.log_history[0], weights(made)["conflict.of_mse"]
    cosines = F.cosine_similarity(ours, theirs).mean().item(), F.cosine_similarity(*layers, dim=0).item()
    assert state[[IMAGES, LAYER]].tolist() == [pytest.approx(value, abs=1e-5) for value in cosines]
    assert logged["conflict/mse"] == pytest.approx(min(cosines), abs=1e-5)
    share = 2 * ours.norm() / (theirs.norm() + 2 * ours.norm())
    assert logged["gradient_share/mse"] == pytest.approx(share.item(), rel=1e-3)


def test_watching_changes_no_bit_and_without_it_nothing_is_kept(tmp_path: Path) -> None:
    made = [
        watched(tmp_path / "off", None, max_steps=3),
        watched(tmp_path / "on", Guard(floor=1.0), max_steps=3),
        watched(tmp_path / "whole", Guard(floor=1.0), max_steps=3, gradient_accumulation_steps=2),
    ]
    for one in made:
        one.train()
    off, on, _ = (weights(one) for one in made)
    assert not any(name.startswith("conflict.") for name in off)
    assert largest_difference(off, {name: on[name] for name in off}) == 0
    assert not any("turned_down" in key or "conflict" in key for entry in made[0].state.log_history for key in entry)
    assert made[2].state.log_history[0]["turned_down/mse"] == 1.0


def test_a_term_that_fights_is_turned_down_told_and_resumed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard(angle=0.9, patience=1)  # whatever the angle is, it is less
    settings: dict[str, Any] = {"max_steps": 12, "save_strategy": "steps", "save_steps": 6, "bf16": True}
    made = [watched(tmp_path / name, guard, Images(16, noisy=True), **settings) for name in ("a", "b")]
    with caplog.at_level(logging.WARNING):
        made[0].train()
    assert (
        "step 1: mse fights the task, by the angle of their gradients: turned down to 0.5 of its weight" in caplog.text
    )
    line = told(made[0].state.log_history)
    assert "it fought the task: turned down from step 1, to 0.25 of its weight" in line
    assert f"Weights: {line}" in caplog.text
    assert made[0].working.facts()["weights"] == line
    kept = load_file(tmp_path / "a" / "checkpoint-6" / DISTILLER_FILE)["conflict.of_mse"]
    assert kept[FACTOR].item() == 0.5
    made[1].train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    assert largest_difference(weights(made[0]), weights(made[1])) == 0


def test_held_out_images_are_not_trained_on_and_measured_in_their_turn(tmp_path: Path) -> None:
    data, guard = Images(12), Guard(floor=1.0, holdout=0.25)
    kept, held = hold_out(data, guard, 42)
    numbers = sorted([*kept.indices, *held.indices])
    assert len(kept) == 9 and len(held) == 3 and numbers == list(range(12))
    cut = watched(tmp_path / "cut", guard, data, max_steps=3)
    plain = watched(tmp_path / "plain", None, kept, max_steps=3)
    for one in (cut, plain):
        one.train()
    before = weights(plain)
    assert largest_difference(before, {name: weights(cut)[name] for name in before}) == 0
    logged = cut.state.log_history[0]
    assert logged["held_out_task_loss"] > 0 and abs(logged["conflict_held_out/mse"]) <= 1
    with pytest.raises(InputError, match="guard.holdout: a stream cannot be cut in two; set it to 0"):
        hold_out(Stream(), guard, 0)


def guarded_trainer(folder: Path, batch: int) -> CanKDTrainer:
    """Two steps, the second with half of the weight; also of test_arithmetic, in two processes."""
    guard = Guard(angle=0.9, patience=1)
    return watched(folder, guard, Images(16, noisy=True), per_device_train_batch_size=batch)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(Images(2))


def test_a_term_on_logits_and_two_terms_are_watched_too(tmp_path: Path) -> None:
    two = [LossTerm(loss="kl", weight=1.0), LossTerm(loss=Away, name="away", pairs=PAIR, weight=Share(0.3))]
    made = watched(tmp_path, Guard(floor=1.0), terms=two, teacher=student(3), max_steps=1)
    made.train()
    logged = made.state.log_history[0]
    assert {f"conflict/{name}" for name in ("kl", "away")} <= logged.keys()
    assert 0 < logged["gradient_share/away"] < 1 and 0 < logged["gradient_share/kl"] < 1


def test_recommended_weights_in_a_recipe() -> None:
    text = """
        output_dir: out
        data: {path: shapes}
        student: {model: a}
        teacher: {model: b}
        distill:
          terms: [{loss: cankd, weight: 2.5, decay: 0.1}, {loss: kl, weight: 1}, {loss: mse, name: none, weight: 0}]
    """
    plain = parse_recipe(text).distill
    assert plain.guard is None and plain.guarding is None and plain.terms[0].weight == 2.5
    made = parse_recipe(text, ["distill.weights=recommended"]).distill
    cankd, kl, none = made.terms
    assert cankd.weight == Share(0.5) and cankd.options == {"gate": 0.1} and cankd.warmup == 0.05 and not cankd.decay
    assert cankd.fade == kl.fade and kl.weight == 1 and none.weight == 0
    assert made.guarding == Guard() and DistillConfig(terms=made.terms, guard=True) == made
    assert parse_recipe(text, ["distill.weights=recommended", "distill.guard=false"]).distill.guarding is None
    assert parse_recipe(text, ["distill.guard={angle: -0.1}"]).distill.guarding == Guard(angle=-0.1)
    phased = parse_recipe(text, ["distill.weights=recommended", "schedule=features_then_task"])
    features, task = (recipe.distill for _, recipe in phase_parts(phased))
    assert features.terms[0].weight == 1 and features.terms[0].fade is None and features.guarding is None
    assert not task.terms and task.task_weight == 1
    with pytest.raises(InputError, match="distill.guard.*is about the terms beside the task, and task_weight is 0"):
        parse_recipe(text, ["distill.guard=true", "distill.task_weight=0"])
    with pytest.raises(InputError, match="distill.guard.patience.*expected a whole number from 1 to 1000, got 0"):
        parse_recipe(text, ["distill.guard={patience: 0}"])


def test_what_cannot_be_watched_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="distill.guard: compares the terms with the task, whose task_weight is 0"):
        trainer(tmp_path, terms=None, objective=Objective(0.0, [LossTerm(loss="mse")], guard=Guard()))
    given = Objective(1.0, [LossTerm(loss="mse")], guard=Guard())
    with pytest.raises(InputError, match="distill.guard: does not see the loss of a compute_loss_func"):
        CanKDTrainer(student(), teacher(), objective=given, compute_loss_func=lambda *_, **__: torch.zeros(()))
    frozen = Objective(1.0, [LossTerm(loss="mse", pairs=PAIR)], frozen=["backbone", "neck"], guard=Guard())
    with pytest.raises(InputError, match="distill.guard: expected taps that train, got a frozen one; leave it out"):
        trainer(tmp_path, terms=None, objective=frozen).train()
    with pytest.raises(InputError, match="floor: expected a number above 0 and at most 1, got 2"):
        Objective(1.0, [LossTerm(loss="mse")], guard=Guard(floor=2.0))


@pytest.mark.slow
def test_a_teacher_of_other_classes_is_turned_down_and_a_good_one_is_not(tmp_path: Path, repo_root: Path) -> None:
    """On the toy set: a good teacher, and the same with its classes swapped around, by `kl` beside the task."""

    def arm(name: str, *changes: str) -> tuple[float, float]:
        """The test mIoU, and what the weight of the term was multiplied by in the end."""
        usual = ["baseline=false", "training.save_strategy=no", "data.generated.train=512"]
        given = [*usual, f"output_dir={tmp_path / name}", *changes]
        report = run(load_recipe(repo_root / "recipes" / "quickstart.yaml", given))
        history = read_json(tmp_path / name / "trainer_state.json")["log_history"]
        factors = [entry["turned_down/kl"] for entry in history if "turned_down/kl" in entry]
        return report.arms[-1].scores["miou"], (factors or [1.0])[-1]

    settings = yaml.safe_load((repo_root / "recipes" / "quickstart.yaml").read_text())["teacher"]["config"]
    sizes = {key: settings[key] for key in ("fpn_channels", "head_channels")}
    student = {"backbone": settings["backbone_config"], "fpn": sizes}
    arm("good", "teacher=null", f"student={json.dumps(student)}", "training.max_steps=600")
    shutil.copytree(tmp_path / "good", tmp_path / "swapped")
    state = load_file(tmp_path / "good" / "model.safetensors")
    state |= {name: state[name].roll(1, 0).contiguous() for name in state if name.startswith("head.classifier")}
    save_file(state, tmp_path / "swapped" / "model.safetensors", metadata={"format": "pt"})
    common = ["distill.terms=[{loss: kl, weight: 1.0}]", "training.max_steps=400", "seed=1"]
    alone, _ = arm("alone", "teacher=null", *common[1:])
    harmed, _ = arm("harmed", f"teacher={{model: {tmp_path / 'swapped'}}}", *common)
    spared, down = arm("spared", f"teacher={{model: {tmp_path / 'swapped'}}}", "distill.guard=true", *common)
    _, kept = arm("helped", f"teacher={{model: {tmp_path / 'good'}}}", "distill.guard=true", *common)
    assert harmed < alone - 0.03 and spared > alone - 0.02
    assert down == pytest.approx(0.01) and kept == 1.0
