"""Weights by gradient share: the share is what was asked, on every rank and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cankd_hf import CanKDTrainer, LossTerm, Objective
from cankd_hf.config.distill import Share
from cankd_hf.errors import InputError
from cankd_hf.names import DISTILLER_FILE
from cankd_hf.runs.recipe import parse_recipe
from cankd_hf.training.predicting import Answers

from .test_objective import segmenter
from .tiny_trainers import Images, largest_difference, student, teacher, trainer, weights


def term(share: float, **settings: Any) -> LossTerm:
    usual: dict[str, Any] = {"loss": "mse", "weight": {"share": share}, "pairs": [[-1, -1]]}
    return LossTerm(**{**usual, **settings})


def norms(made: Any) -> dict[str, float]:
    """The gradient of each weighted loss at the student's last map, of the first batch."""
    distiller = made.distiller.train()
    batch = made._prepare_inputs(next(iter(made.get_train_dataloader())))
    outputs = made.source(batch)
    found = distiller.student(pixel_values=batch["pixel_values"], labels=batch["labels"])
    maps = distiller.taps.collect(tuple(batch["pixel_values"].shape[-2:]))
    losses = {"task": found.loss}
    for item, value in distiller.values(distiller.connect(maps, outputs), Answers(distiller.student), outputs):
        losses[item.term.label] = distiller.shares.weight(item) * item.weight * value
    tap = maps[-1] if maps[-1]._base is None else maps[-1]._base  # a map may be a view of what the head reads
    return {name: torch.autograd.grad(loss, tap, retain_graph=True)[0].norm().item() for name, loss in losses.items()}


@pytest.mark.parametrize("scale", [1.0, 1000.0], ids=["as it is", "a thousand times"])
def test_a_term_has_the_share_it_asks_for_whatever_its_scale(scale: float, tmp_path: Path) -> None:
    cosine = term(0.2, loss="cosine", options={"cosine": scale, "smooth_l1": 0.0})
    given = [cosine, term(0.3), term(0.5, name="fixed", weight=2.0)]
    made = trainer(tmp_path, Images(8), terms=given, max_steps=1, learning_rate=0.0)
    made.train()
    found = norms(made)
    whole = sum(found[name] for name in ("cosine", "mse")) / 0.5
    assert found["cosine"] / whole == pytest.approx(0.2, rel=1e-3)
    assert found["mse"] / whole == pytest.approx(0.3, rel=1e-3)
    logged = made.state.log_history[0]
    assert logged["weight/mse"] == pytest.approx(float(weights(made)["shares.of_mse"])) and logged["weight/mse"] > 0
    total = logged["loss_task"] + 2 * logged["loss_fixed"]
    total += sum(logged[f"weight/{name}"] * logged[f"loss_{name}"] for name in ("cosine", "mse"))
    assert logged["loss"] == pytest.approx(total, rel=1e-3)


def test_weights_follow_slowly_and_a_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    settings = {"max_steps": 14, "save_strategy": "steps", "save_steps": 4, "terms": [term(0.1)]}
    made = [trainer(tmp_path / name, Images(16, noisy=True), **settings) for name in ("a", "b")]
    made[0].train()
    logged = [entry["weight/mse"] for entry in made[0].state.log_history if "weight/mse" in entry]
    assert len(set(logged[:10])) == 1 and logged[10] != logged[9] and len(set(logged[10:])) == 1
    assert load_file(tmp_path / "a" / "checkpoint-8" / DISTILLER_FILE)["shares.of_mse"].item() > 0
    made[1].train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-8"))
    assert largest_difference(weights(made[0]), weights(made[1])) == 0


def test_a_new_objective_keeps_the_weight_of_the_same_term(tmp_path: Path) -> None:
    made = trainer(tmp_path, terms=[term(0.1)], max_steps=1)
    made.train()
    before = weights(made)["shares.of_mse"]
    made.set_objective(Objective(1.0, [term(0.1), term(0.2, name="other")]))
    after = weights(made)
    assert torch.equal(after["shares.of_mse"], before) and after["shares.of_other"] == 0
    made.train()
    assert weights(made)["shares.of_other"] > 0


def test_a_term_that_starts_later_is_measured_when_it_does(tmp_path: Path) -> None:
    made = trainer(tmp_path, Images(8), terms=[term(0.1), term(0.2, name="late")], max_steps=1)
    shares, tap = made.distiller.shares, torch.ones(1, 8, 2, 2, requires_grad=True)
    first, late = ((item, tap.square().mean()) for item in made.distiller.placed)
    maps = [tap] * len(made.distiller.levels)
    shares.measure(tap.sum(), [first], maps)
    assert shares.due(1) and shares.logged()["weight/late"] == 0 < shares.logged()["weight/mse"]
    shares.measure(tap.sum(), [first, late], maps)
    assert not shares.due(2) and shares.due(10) and shares.logged()["weight/late"] > 0


def test_shares_in_a_recipe() -> None:
    text = """
        output_dir: out
        data: {path: shapes}
        student: {model: a}
        teacher: {model: b}
        distill: {terms: [{loss: mse, weight: {share: 0.1}}]}
    """
    recipe = parse_recipe(text)
    assert recipe.distill.terms[0].weight == Share(0.1) and recipe.distill.terms[0].weights(2) == [1.0, 1.0]
    assert parse_recipe(text, ["distill.terms.0.weight.share=0.25"]).distill.terms[0].weight == Share(0.25)
    with pytest.raises(InputError, match="weight.share .*expected a number above 0 and below 1, got 1.5"):
        parse_recipe(text, ["distill.terms.0.weight.share=1.5"])
    with pytest.raises(InputError, match="did you mean 'share'"):
        parse_recipe(text, ["distill.terms.0.weight={shar: 0.5}"])


def test_shares_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the shares add up to 1.1; leave some gradient"):
        Objective(1.0, [term(0.5), term(0.6, name="b")])
    with pytest.raises(InputError, match="a share of nothing else is all; give one term a number"):
        Objective(0.0, [term(0.5)])
    with pytest.raises(InputError, match="kl.weight.share: is measured on maps, and kl reads logits; give a number"):
        trainer(tmp_path, teacher=segmenter(), terms=[LossTerm(loss="kl", weight=Share(0.1))])
    with pytest.raises(InputError, match="does not see the loss of a compute_loss_func"):
        CanKDTrainer(student(), teacher(), terms=[term(0.1)], compute_loss_func=lambda *_, **__: torch.zeros(()))
    with pytest.raises(InputError, match="mse.weight.share: expected taps that train, got a frozen one"):
        trainer(tmp_path, objective=Objective(1.0, [term(0.1)], frozen=["backbone", "neck"]), terms=None).train()
