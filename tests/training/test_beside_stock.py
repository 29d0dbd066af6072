"""Scenarios of the stock Trainer's own tests, with it as control beside ours: equal numbers without a teacher.

Then the same habits with a teacher, where no stock run could be the control.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from cankd_hf.models.fpn.modeling_cankd_fpn import FPNForSemanticSegmentation
from cankd_hf.training.trainer import CanKDTrainer

from .beside_stock import Events, accuracy, assert_same, both, checkpoints, images, ours, pixel_loss, stock, weights
from .tiny_trainers import largest_difference, student, teacher, terms

EVAL: dict[str, Any] = {"eval_dataset": images(5), "compute_metrics": accuracy}
OFTEN = {**EVAL, "eval_strategy": "steps", "eval_steps": 2}
SAVE = {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return both(tmp_path_factory.mktemp("plain"))


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_a_large_batch(tmp_path: Path) -> None:
    for given in ({}, {"teacher": teacher(), "terms": terms()}, {"compute_loss_func": pixel_loss}):
        made = [
            ours(
                tmp_path / f"{size}", per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, **given
            )
            for size in (2, 4)
        ]
        for one in made:
            one.train_dataset.dataset.images = images(8).images
            one.train()
        first, second = ([entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in made)
        assert first == pytest.approx(second, rel=1e-4)


@pytest.mark.slow
def test_epochs_and_steps_are_counted_as_in_the_stock_trainer(tmp_path: Path) -> None:
    for number, (epochs, steps, expected) in enumerate([(1.5, -1, 5), (3, 2, 2), (1, 7, 7)]):
        _, made = both(tmp_path / str(number), num_train_epochs=epochs, max_steps=steps)
        assert made.state.global_step == expected
        assert len([entry for entry in made.state.log_history if "loss" in entry]) == expected


@pytest.mark.parametrize("resume", [True, "path", pytest.param(False, marks=pytest.mark.slow)], ids=str)
def test_a_resumed_run_is_the_whole_one(resume: Any, plain: tuple[Any, Any], tmp_path: Path) -> None:
    for name, build in (("stock", stock), ("ours", ours)):
        build(tmp_path / name, **SAVE, num_train_epochs=1).train()
        # Interrupted after step 2: as if the later checkpoint had not been written.
        (tmp_path / name / "checkpoint-4").rename(tmp_path / f"later-{name}")
        made = build(tmp_path / name, **SAVE)
        given = str(tmp_path / name / "checkpoint-2") if resume == "path" else resume
        made.train(resume_from_checkpoint=given)
        assert largest_difference(weights(made), weights(plain[0])) == 0
        assert [entry["step"] for entry in made.state.log_history if "loss" in entry] == [1, 2, 3, 4]


@pytest.mark.slow
def test_ignore_data_skip_starts_the_epoch_anew(tmp_path: Path) -> None:
    made = []
    for name, build in (("stock", stock), ("ours", ours)):
        build(tmp_path / name, **SAVE).train()
        made.append(build(tmp_path / f"{name}-again", **SAVE, ignore_data_skip=True))
        made[-1].train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-2"))
    assert_same(*made)


def test_the_best_model_is_loaded_and_kept(tmp_path: Path) -> None:
    given = {**OFTEN, **SAVE, "eval_steps": 1, "save_steps": 1, "save_total_limit": 1, "greater_is_better": True}
    control, made = both(tmp_path, load_best_model_at_end=True, metric_for_best_model="accuracy", **given)
    assert made.state.best_global_step == control.state.best_global_step
    assert checkpoints(tmp_path / "ours") == [f"checkpoint-{made.state.best_global_step}"]


def test_a_score_of_ours_selects_the_best_model_with_a_teacher(tmp_path: Path) -> None:
    given = {"eval_dataset": images(4), "eval_strategy": "steps", "save_strategy": "best", "eval_steps": 1}
    made = ours(
        tmp_path, **given, metric_for_best_model="miou", teacher=teacher(), terms=terms(), load_best_model_at_end=True
    )
    made.train()
    scores = {entry["step"]: entry["eval_miou"] for entry in made.state.log_history if "eval_miou" in entry}
    assert made.state.best_metric == max(scores.values()) == made.evaluate()["eval_miou"]


def test_save_only_model_saves_no_optimizer(tmp_path: Path) -> None:
    both(tmp_path, **SAVE, save_only_model=True)
    for name in ("stock", "ours"):
        files = {path.name for path in (tmp_path / name / "checkpoint-2").iterdir()}
        assert "model.safetensors" in files and not files & {"optimizer.pt", "scheduler.pt", "rng_state.pth"}


def test_early_stopping_stops_where_it_stops_the_stock_trainer(tmp_path: Path) -> None:
    given = {**OFTEN, **SAVE, "eval_steps": 1, "save_steps": 1, "max_steps": 6, "learning_rate": 1e-9}
    stops = lambda: [EarlyStoppingCallback(1, 0.5)]  # noqa: E731
    best = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy", "greater_is_better": True}
    _, made = both(tmp_path, callbacks=stops, **best, **given)
    assert made.state.global_step == 2


def test_callbacks_hear_the_same_events_in_the_same_order(tmp_path: Path) -> None:
    control, made = both(
        tmp_path,
        lambda trainer: (trainer.train(), trainer.predict(images(2))),
        callbacks=lambda: [Events()],
        gradient_accumulation_steps=2,
        **OFTEN,
        **SAVE,
    )
    heard = [
        next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Events)).seen
        for trainer in (control, made)
    ]
    assert heard[0] == heard[1] and {"on_substep_end", "on_save", "on_evaluate", "on_predict"} <= set(heard[0])


class Counter(TrainerCallback):
    """A callback with a state of its own."""

    def __init__(self, steps: int = 0) -> None:
        self.steps = steps

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps += 1


def test_callbacks_can_be_added_popped_and_removed(tmp_path: Path) -> None:
    made = ours(tmp_path, teacher=teacher(), terms=terms())
    made.add_callback(Counter)
    popped = made.pop_callback(Counter)
    assert isinstance(popped, Counter)
    made.add_callback(popped)
    made.train()
    made.remove_callback(popped)
    made.train()
    assert popped.steps == 4


def test_save_and_eval_steps_that_do_not_match_are_refused_as_by_the_stock_arguments(tmp_path: Path) -> None:
    for build in (stock, ours):
        with pytest.raises(ValueError, match="saving steps to be a round multiple of the evaluation steps"):
            build(tmp_path, **{**OFTEN, **SAVE, "save_steps": 3}, load_best_model_at_end=True)
        with pytest.raises(ValueError, match="eval_strategy.*eval_dataset"):
            build(tmp_path, eval_strategy="steps")


def test_predictions_and_labels_are_those_of_the_stock_trainer(tmp_path: Path) -> None:
    found = [build(tmp_path / name).predict(images(3)) for name, build in (("stock", stock), ("ours", ours))]
    assert np.array_equal(found[0].predictions, found[1].predictions)
    assert np.array_equal(found[0].label_ids, found[1].label_ids)
    assert found[0].metrics["test_loss"] == found[1].metrics["test_loss"] and found[1].metrics["test_miou"] > 0


@pytest.mark.parametrize("with_teacher", [False, True])
def test_given_optimizers_train_as_in_the_stock_trainer(with_teacher: bool, tmp_path: Path) -> None:
    made = []
    for name, build in (("stock", stock), ("ours", ours)):
        model = student()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pair = (optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))
        more = {"teacher": teacher(), "terms": terms()} if with_teacher and build is ours else {}
        made.append(build(tmp_path / name, model=model, optimizers=pair, **more))
        before = {name: value.clone() for name, value in made[-1].model.named_parameters()}
        made[-1].train()
    if not with_teacher:
        assert_same(*made)
        return
    moved = {name for name, value in made[1].distiller.named_parameters() if not torch.equal(value, before[name])}
    assert {name for name in before if name.startswith("connectors.") and "weight" in name} <= moved
    [group] = made[1].optimizer.param_groups
    assert len(group["params"]) == len(before) and group["lr"] == pytest.approx(0.1 * 0.5**4)


class Stream(IterableDataset):
    """A data set that can only be read in order, and knows its length."""

    def __init__(self, count: int) -> None:
        self.samples = images(count)

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Any:
        return (self.samples[index] for index in range(len(self.samples)))


@pytest.mark.slow
def test_an_iterable_data_set_with_a_length_is_read_in_order(tmp_path: Path) -> None:
    both(tmp_path / "steps", train_dataset=Stream(8))
    both(tmp_path / "epochs", train_dataset=Stream(8), max_steps=-1, num_train_epochs=2)
    with_teacher = ours(tmp_path / "teacher", train_dataset=Stream(8), teacher=teacher(), terms=terms())
    with_teacher.train()
    assert with_teacher.state.global_step == 4


class WithLoaders:
    """What people override for data of their own."""

    def get_train_dataloader(self: Any) -> DataLoader:
        order = SequentialSampler(self.train_dataset)
        return DataLoader(self.train_dataset, 2, sampler=order, collate_fn=self.data_collator)

    def get_eval_dataloader(self: Any, eval_dataset: Any = None) -> DataLoader:
        return DataLoader(images(2), 1, collate_fn=self.data_collator)


class WithSampler:
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.WeightedRandomSampler([1.0, 0, 0, 0, 0, 1.0], 6, generator=torch.Generator())


@pytest.mark.parametrize("mixin", [WithLoaders, WithSampler])
@pytest.mark.slow
def test_overridden_loaders_and_samplers_are_used(mixin: type, tmp_path: Path) -> None:
    made = [
        build(tmp_path / name, cls=type(mixin.__name__, (mixin, base), {}), **OFTEN)
        for name, build, base in (("stock", stock, Trainer), ("ours", ours, CanKDTrainer))
    ]
    for one in made:
        one.train()
    assert_same(*made)


@pytest.mark.slow
def test_auto_find_batch_size_halves_it_as_the_stock_trainer_does(tmp_path: Path) -> None:
    class Full(TrainerCallback):
        calls = 0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.calls += 1
            if self.calls == 1:
                raise RuntimeError("CUDA out of memory.")

    _, made = both(tmp_path, callbacks=lambda: [Full()], auto_find_batch_size=True, per_device_train_batch_size=4)
    assert made._train_batch_size < 4


@pytest.mark.slow
def test_a_model_init_starts_every_training_from_the_same_weights(tmp_path: Path) -> None:
    config = student().config
    _, made = both(tmp_path, model_init=lambda: FPNForSemanticSegmentation(config))
    first = weights(made)
    made.train()
    assert largest_difference(first, weights(made)) == 0
    taught = ours(tmp_path / "taught", model_init=lambda trial: student(), teacher=teacher(), terms=terms())
    ends = []
    for _ in range(2):
        taught.train()
        ends.append({name: value.clone() for name, value in taught.distiller.state_dict().items()})
    assert largest_difference(*ends) == 0 and any(name.startswith("connectors.") for name in ends[0])
