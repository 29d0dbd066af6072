"""Settings of the stock Trainer, one by one: they change our runs as they change its own, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EvalPrediction

from cankd_hf.training.distiller import Distiller

from .beside_stock import accuracy, assert_same, both, history, images, ours, pixel_loss

EVAL: dict[str, Any] = {"eval_dataset": images(5), "compute_metrics": accuracy}
OFTEN = {**EVAL, "eval_strategy": "steps", "eval_steps": 2}
SAVE = {"save_strategy": "steps", "save_steps": 2}


def per_batch(prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
    return accuracy(EvalPrediction(prediction.predictions.numpy(), prediction.label_ids.numpy()))


def losses_and_inputs(prediction: EvalPrediction) -> dict[str, float]:
    return {"of_losses": float(prediction.losses.sum()), "of_inputs": float(prediction.inputs.sum())}


def of_batches(prediction: EvalPrediction) -> dict[str, float]:
    return {"batches": len(prediction.predictions), "first": float(prediction.predictions[0].sum())}


# Each differs from a plain run in what it logs or trains; a setting that both ignored would show nothing.
CHANGES: dict[str, dict[str, Any]] = {
    "batch size": {"per_device_train_batch_size": 3},
    "rates": {"learning_rate": 0.01, "warmup_steps": 2, "lr_scheduler_type": "cosine"},
    "restarts": {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}},
    "adam": {"weight_decay": 0.1, "adam_beta1": 0.5, "adam_beta2": 0.5, "adam_epsilon": 0.1},
    "optimizer": {"optim": "rmsprop", "optim_args": "alpha=0.5"},
    "accumulation": {"gradient_accumulation_steps": 2},
    "clipping": {"max_grad_norm": 0.01},
    "bf16": {"bf16": True},
    "order": {"train_sampling_strategy": "sequential"},
    "seed": {"seed": 7},
    "data_seed": {"data_seed": 7, "accelerator_config": {"use_seedable_sampler": True}},
    "drop_last": {"dataloader_drop_last": True, "per_device_train_batch_size": 4, "max_steps": -1},
    "neftune": {"neftune_noise_alpha": 5.0},
    "tokens": {"include_num_input_tokens_seen": "all"},
    "logging": {"logging_steps": 3, "logging_first_step": True},
    "log epochs": {"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2.5},
    "eval": OFTEN,
    "eval late": {**OFTEN, "eval_delay": 3, "eval_on_start": True, "per_device_eval_batch_size": 3},
    "loss only": {**OFTEN, "prediction_loss_only": True},
    "preprocess": {**OFTEN, "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(1)},
    "batch metrics": {**OFTEN, "compute_metrics": per_batch, "batch_eval_metrics": True},
    "for metrics": {**OFTEN, "compute_metrics": losses_and_inputs, "include_for_metrics": ["loss", "inputs"]},
    "apart": {**OFTEN, "compute_metrics": of_batches, "eval_do_concat_batches": False, "eval_accumulation_steps": 1},
    "plateau": {**OFTEN, "lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "checksum"},
    "loss function": {**OFTEN, "compute_loss_func": pixel_loss, "gradient_accumulation_steps": 2},
    "own optimizer": {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})},
    "many sets": {**EVAL, "eval_dataset": {"a": images(3), "b": images(4)}, "eval_strategy": "epoch"},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return both(tmp_path_factory.mktemp("plain"))


def test_a_plain_run_is_that_of_the_stock_trainer(plain: tuple[Any, Any]) -> None:
    control, made = plain
    assert isinstance(made.model, Distiller) and len(history(made)) == 5 and made.state.global_step == 4


# The quick part: several at once.
TOGETHER = {
    "training": [
        "rates",
        "adam",
        "accumulation",
        "clipping",
        "seed",
        "tokens",
        "logging",
        "batch size",
        "neftune",
        "drop_last",
    ],
    "evaluation": ["eval late", "preprocess", "order", "optimizer", "bf16"],
    "functions": ["loss function", "own optimizer", "for metrics"],
}


@pytest.mark.parametrize("names", TOGETHER.values(), ids=TOGETHER)
def test_settings_together_change_the_run_as_they_change_a_stock_run(names: list[str], tmp_path: Path) -> None:
    both(tmp_path, **{key: value for name in names for key, value in CHANGES[name].items()})


@pytest.mark.slow
@pytest.mark.parametrize("settings", CHANGES.values(), ids=CHANGES)
def test_settings_change_the_run_as_they_change_a_stock_run(
    settings: dict[str, Any], plain: tuple[Any, Any], tmp_path: Path
) -> None:
    control, _ = both(tmp_path, **settings)
    assert history(control) != history(plain[0])


# What must not change the numbers of a run.
UNCHANGED: dict[str, dict[str, Any]] = {
    "workers": {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 1, "dataloader_in_order": False},
    "cache": {"torch_empty_cache_steps": 1},
    "checks": {"debug": "underflow_overflow", "skip_memory_metrics": False},
    "columns": {"remove_unused_columns": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("settings", UNCHANGED.values(), ids=UNCHANGED)
def test_settings_that_leave_the_numbers_as_they_are(
    settings: dict[str, Any], plain: tuple[Any, Any], tmp_path: Path
) -> None:
    made = ours(tmp_path, **settings)
    made.train()
    assert_same(plain[0], made)
    memory = any("_mem_" in key for entry in made.state.log_history for key in entry)
    assert memory == (not made.args.skip_memory_metrics)


@pytest.mark.slow
def test_full_determinism_switches_it_on(tmp_path: Path) -> None:
    try:
        both(tmp_path, full_determinism=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
