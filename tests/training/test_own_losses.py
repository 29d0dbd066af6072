"""Losses of the user, by `compute_loss` and `compute_loss_func`, without and with a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from cankd_hf.training.trainer import CanKDTrainer

from .beside_stock import accuracy, assert_same, history, images, ours, pixel_loss, stock, weights
from .tiny_trainers import largest_difference, teacher, terms

EVAL: dict[str, Any] = {"eval_dataset": images(5), "compute_metrics": accuracy}
OFTEN = {**EVAL, "eval_strategy": "steps", "eval_steps": 2}
SAVE = {"save_strategy": "steps", "save_steps": 2}


class OwnLoss:
    """The most common override of all."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        assert outputs[0] is outputs["logits"] is outputs.logits
        logits = torch.nn.functional.interpolate(outputs.logits, size=labels.shape[-2:])
        loss = torch.nn.functional.cross_entropy(logits, labels)
        return (loss, outputs) if return_outputs else loss


def test_a_compute_loss_of_ones_own_trains_and_is_evaluated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = {**OFTEN, "compute_metrics": None}
    control = stock(tmp_path / "stock", cls=type("S", (OwnLoss, Trainer), {}), **given)
    made = ours(tmp_path / "ours", cls=type("O", (OwnLoss, CanKDTrainer), {}), **given)
    for one in (control, made):
        one.train()
    assert_same(control, made)
    assert "asks no teacher" not in caplog.text
    idle = ours(tmp_path / "idle", cls=type("Idle", (OwnLoss, CanKDTrainer), {}), teacher=teacher(), terms=terms())
    idle.train()
    assert caplog.text.count("compute_loss of Idle asks no teacher, so nothing is distilled") == 1


def test_a_loss_added_to_that_of_the_trainer_reaches_the_student(tmp_path: Path) -> None:
    class Added(CanKDTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **more)
            loss = loss + 5 * outputs.logits.square().mean()
            return (loss, outputs) if return_outputs else loss

    given = {"teacher": teacher(), "terms": terms()}
    plain, added = ours(tmp_path / "a", **given), ours(tmp_path / "b", cls=Added, **given)
    for made in (plain, added):
        made.train()
    assert history(plain)[0]["loss"] < history(added)[0]["loss"]
    assert largest_difference(weights(plain), weights(added)) > 0
    assert {"loss_task", "loss_cankd"} <= added.state.log_history[0].keys()


def test_the_log_of_a_loss_function_adds_up_with_a_teacher(tmp_path: Path) -> None:
    calls: list[tuple[str, bool]] = []

    def counted(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        calls.append((type(outputs).__name__, num_items_in_batch is not None))
        return pixel_loss(outputs, labels, num_items_in_batch)

    given = {"teacher": teacher(), "terms": terms(), "gradient_accumulation_steps": 2, "task_weight": 3.0}
    made = ours(tmp_path, compute_loss_func=counted, **given)
    made.train()
    assert calls == [("SemanticSegmenterOutput", True)] * 6
    entry = made.state.log_history[0]
    assert entry["loss"] == pytest.approx(3 * entry["loss_task"] + 2 * entry["loss_cankd"], rel=1e-5)
