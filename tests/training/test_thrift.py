"""A teacher that is asked in some steps only, and terms that fade: what is computed, logged, resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cankd_hf.config.distill import LossTerm
from cankd_hf.config.teacher import TeacherConfig
from cankd_hf.errors import InputError
from cankd_hf.training.objective import Objective
from cankd_hf.training.trainer import CanKDTrainer

from .tiny_trainers import Images, dinov2, largest_difference, student, terms, trainer, weights


def rare(every: int) -> TeacherConfig:
    return TeacherConfig(config=dinov2(), every=every)


def thrifty_trainer(folder: Path, batch_size: int) -> CanKDTrainer:
    """With a rare teacher, a term that fades, and an average of the weights."""
    settings: dict[str, Any] = {"max_steps": 6, "per_device_train_batch_size": batch_size, "ema": 0.8}
    return trainer(folder, Images(16, noisy=True), teacher=rare(2), terms=terms(fade=[0.1, 0.7]), **settings)


def averaged(made: CanKDTrainer) -> dict[str, torch.Tensor]:
    assert made.average is not None
    return {f"average.{name}": value.clone() for name, value in made.average.state.items()}


def watched(made: CanKDTrainer) -> list[int]:
    """The step of every call of the teacher, from here on."""
    calls: list[int] = []
    source = made.source

    def counting(batch: Any, names: Any = None) -> Any:
        calls.append(made.state.global_step)
        return source(batch, names)

    made.source = counting
    return calls


def test_a_teacher_is_asked_in_every_third_step_and_the_log_has_means_over_these(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 6, "logging_steps": 3, "per_device_train_batch_size": 4}
    made = trainer(tmp_path, teacher=rare(3), gradient_accumulation_steps=2, **settings)
    calls = watched(made)
    made.train()
    assert calls == [0, 0, 3, 3], "both parts of a step ask it, or neither"
    lines = [entry for entry in made.state.log_history if "loss" in entry]
    assert len(lines) == 2
    for entry in lines:
        # the loss is a mean over three steps, the term's value one over the only step that has it
        assert entry["loss"] == pytest.approx(entry["loss_task"] + 2.0 * entry["loss_cankd"] / 3, rel=1e-3)
        assert any(name.startswith("raw_") for name in entry), "measured in the last step before the line that asks"


def test_steps_without_the_teacher_are_those_of_a_student_alone(tmp_path: Path) -> None:
    made = trainer(tmp_path / "a", teacher=rare(2), max_steps=2)
    made.train()
    first = trainer(tmp_path / "b", max_steps=1, teacher=rare(1))
    first.train()
    alone = trainer(tmp_path / "c", teacher=None, terms=None, model=first.student, max_steps=2, save_strategy="no")
    epoch = alone.get_train_dataloader()
    batches = list(epoch)
    alone.create_optimizer()
    alone.model.train()
    loss = alone.compute_loss(alone.model, alone._prepare_inputs(batches[1]))
    loss.backward()
    alone.accelerator.clip_grad_norm_(alone.model.parameters(), alone.args.max_grad_norm)
    alone.optimizer.step()
    expected = dict(alone.student.state_dict())
    assert largest_difference(dict(made.student.state_dict()), expected) < 1e-6


def test_a_run_with_a_rare_teacher_and_a_fading_term_resumes_bit_for_bit(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 6, "per_device_train_batch_size": 4, "optim": "adamw_torch"}
    settings |= {"teacher": rare(2), "terms": terms(fade=[0.1, 0.7]), "learning_rate": 1e-3}
    data = Images(16, noisy=True)
    whole = trainer(tmp_path / "whole", data, save_strategy="steps", save_steps=3, **settings)
    calls = watched(whole)
    whole.train()
    assert calls == [0, 2, 4]
    resumed = trainer(tmp_path / "resumed", data, model=student(seed=5), **settings)
    calls = watched(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert calls == [4]
    assert largest_difference(weights(whole), weights(resumed)) == 0


def test_the_weight_falls_between_two_shares_of_the_run_and_stays_at_0() -> None:
    term = LossTerm(fade=[0.2, 0.6])
    assert [round(term.factor(step, 10), 6) for step in range(10)] == [1, 1, 1, 0.75, 0.5, 0.25, 0, 0, 0, 0]
    assert term.taught(10) == 6 and LossTerm(fade=[0.25, 0.25]).taught(10) == 3
    assert [LossTerm(fade=[0.25, 0.25]).factor(step, 10) for step in range(4)] == [1, 1, 1, 0]
    assert LossTerm(decay=0.5).taught(10) == 10 and LossTerm(weight=0.0).taught(10) == 0
    assert Objective(1.0, [term, LossTerm(name="b", fade=[0, 0.9])]).taught(10) == 9


def test_nothing_wakes_a_teacher_whose_terms_have_faded(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=20, terms=terms(fade=[0.0, 0.5]), eval_dataset=Images(4), logging_steps=5)
    calls = watched(made)
    made.train()
    # one a step, two images of the evaluation at the start, in the middle and after the last step that learns from it
    assert calls == [0, *range(6), *range(5, 10), 10] and made.distiller.taps is not None
    assert not made.distiller.taps._outputs, "maps that nobody reads are not kept"
    held = [entry["step"] for entry in made.state.log_history if "held_loss" in entry]
    assert held == [0, 5, 10]


def test_what_leaves_nothing_to_learn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^teacher\.every: expected 1 with task_weight 0"):
        trainer(tmp_path, teacher=rare(2), task_weight=0.0)
    with pytest.raises(InputError, match="nothing is left to learn once all terms have faded"):
        trainer(tmp_path, terms=terms(fade=[0.0, 0.5]), task_weight=0.0)
    for fade, decay, said in (([0.6, 0.2], 0.0, "start <= end"), ([0.1, 0.2], 0.1, "got both")):
        with pytest.raises(InputError, match=f"fade: expected .*{said}"):
            trainer(tmp_path, terms=terms(fade=fade, decay=decay))
