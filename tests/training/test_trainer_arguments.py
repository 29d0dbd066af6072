"""Arguments of the Trainer: their order, what contradicts, optimizers, samplers, searches, cards."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers.trainer
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_utils import HPSearchBackend

from cankd_hf.errors import InputError
from cankd_hf.training.arguments import CanKDConfig
from cankd_hf.training.trainer import CanKDTrainer

from .beside_stock import SETTINGS, accuracy, images, ours, stock
from .detector_trainers import Boxed, detector_trainer
from .tiny_trainers import Images, student, teacher, terms


def taught(folder: Path, **settings: Any) -> CanKDTrainer:
    return ours(folder, **{"teacher": teacher(), "terms": terms(), "max_steps": 2, **settings})


def test_arguments_may_come_in_the_order_of_the_stock_trainer(tmp_path: Path) -> None:
    plain = TrainingArguments(str(tmp_path), **SETTINGS)
    made = CanKDTrainer(student(), plain, None, images(), images(2))
    assert made.teacher is None and made.args.max_steps == 4 and made.evaluate()["eval_miou"] > 0
    assert made.args is not plain and isinstance(made.args, CanKDConfig) and made.args.lr_drops == []
    made.train()
    with_teacher = CanKDTrainer(student(), teacher(), plain, train_dataset=images())
    assert with_teacher.teacher is not None


def test_arguments_of_ones_own_class_keep_their_fields(tmp_path: Path) -> None:
    class Mine(TrainingArguments):
        note = "mine"

    made = CanKDTrainer(student(), args=Mine(str(tmp_path), **SETTINGS), train_dataset=images())
    assert isinstance(made.args, Mine) and isinstance(made.args, CanKDConfig) and made.args.note == "mine"
    assert made.args.to_dict()["backbone_lr_scale"] == 1.0
    made.train()


def test_arguments_of_a_command_line_are_parsed(tmp_path: Path) -> None:
    line = ["--output_dir", str(tmp_path), "--max_steps", "3", "--lr_drops", "0.5", "0.8", "--use_cpu", "True"]
    [args] = HfArgumentParser(CanKDConfig).parse_args_into_dataclasses(line)
    assert (args.max_steps, args.lr_drops) == (3, [0.5, 0.8])


def test_settings_that_are_refused_are_refused_when_they_are_set_later(tmp_path: Path) -> None:
    args = CanKDConfig(str(tmp_path), use_cpu=True)
    args.bf16_full_eval = True
    with pytest.raises(InputError, match="training.bf16_full_eval: it casts the student for good"):
        CanKDTrainer(student(), args=args)


def test_the_training_set_has_what_the_users_has(tmp_path: Path) -> None:
    data = images()
    data.column_names = ["pixel_values", "labels"]
    made = taught(tmp_path, train_dataset=data)
    assert made.train_dataset.column_names == data.column_names and len(made.train_dataset) == len(data)
    assert not hasattr(made.train_dataset, "__getitems__") and not hasattr(made.train_dataset, "unknown")


@pytest.mark.parametrize(
    ("arguments", "named", "said"),
    [
        ([None, None, None], {}, "model: expected a student or a model_init, got neither"),
        (["model"], {"model_init": student}, "model: expected a student or a model_init, got both"),
        (["model", "args", "args"], {}, "args: given twice, once in the teacher's place"),
        (["model", None, "args", None, 1], {}, "expected at most model, teacher and args without a name, got 5"),
        (["model", "args", None, 1], {"train_dataset": 1}, "train_dataset: given twice"),
        (["model", "args"], {"tokenizer": 1}, "tokenizer: not an argument of CanKDTrainer"),
        (["model", None, 3], {}, "args: expected a cankd_hf.CanKDConfig, got int"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused(
    arguments: list[Any], named: dict[str, Any], said: str, tmp_path: Path
) -> None:
    known = {"model": student(), "args": TrainingArguments(str(tmp_path), **SETTINGS)}
    with pytest.raises(InputError, match=said):
        CanKDTrainer(*[known.get(value, value) if isinstance(value, str) else value for value in arguments], **named)


def test_settings_that_contradict_given_functions_are_refused(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD(student().parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for said, given in {
        "optimizers: model_init makes new weights": {"model_init": student, "optimizers": (optimizer, None)},
        "backbone_lr_scale: the given optimizer": {"optimizers": (optimizer, None), "backbone_lr_scale": 0.1},
        "lr_drops: a scheduler is given": {"optimizers": (optimizer, schedule), "lr_drops": [0.5]},
        "compute_loss_func: it is the task's loss": {"task_weight": 0.0, "compute_loss_func": accuracy, **_teach()},
    }.items():
        with pytest.raises(InputError, match=said):
            ours(tmp_path, **given)


def _teach() -> dict[str, Any]:
    return {"teacher": teacher(), "terms": terms()}


def test_groups_made_of_the_student_get_the_distillation_modules_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = student()
    groups = [
        {"params": list(model.backbone.parameters()), "lr": 0.01},
        {"params": [*model.neck.parameters(), *model.head.parameters()], "lr": 0.1},
    ]
    made = taught(tmp_path, model=model, optimizer_cls_and_kwargs=(torch.optim.SGD, {"params": groups, "lr": 0.1}))
    before = [len(group["params"]) for group in groups]
    made.train()
    made.train()
    held = [len(group["params"]) for group in made.optimizer.param_groups]
    extra = len([name for name, _ in made.model.named_parameters() if not name.startswith("student.")])
    assert held == [before[0], before[1] + extra] and extra > 0
    assert caplog.text.count("connectors and losses were in none of its groups") == 1


def test_a_scaled_backbone_is_scaled_once_in_two_trainings(tmp_path: Path) -> None:
    made = taught(tmp_path, backbone_lr_scale=0.5, lr_scheduler_type="constant")
    made.train()
    first = sorted(group["lr"] for group in made.optimizer.param_groups)
    made.train()
    assert sorted(group["lr"] for group in made.optimizer.param_groups) == first


def test_target_modules_are_named_as_in_the_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def handler(context: Any) -> Any:
        seen.append([name for name, _ in context.model.named_modules() if name.startswith("backbone")])
        return torch.optim.SGD, {"lr": 0.1, "params": [{"params": list(context.model.parameters())}]}

    monkeypatch.setitem(transformers.trainer._OPTIMIZER_HANDLERS, "sgd", handler)
    made = taught(tmp_path, optim="sgd", optim_target_modules=["backbone"])
    made.train()
    assert seen[0] and len(made.optimizer.param_groups[0]["params"]) == len(list(made.model.parameters()))


class Keys:
    """A sampler that yields other numbers than Python's own."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Any:
        return (self.kind(index) for index in range(4))


@pytest.mark.parametrize("kind", [np.int64, str])
def test_samplers_may_yield_keys_of_any_kind(kind: Any, tmp_path: Path) -> None:
    class Named(Images):
        def __getitem__(self, index: Any) -> Any:
            return super().__getitem__(int(index))

    class Sampled(CanKDTrainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return Keys(kind)

    made = taught(tmp_path, cls=Sampled, train_dataset=Named(4, size=32), seed=2**31)
    made.train()
    assert made.state.global_step == 2


def test_lengths_of_a_column_order_the_batches(tmp_path: Path) -> None:
    from datasets import Dataset as Table

    def decoded(rows: dict[str, Any]) -> dict[str, Any]:
        count = len(rows["area"])
        made = {"pixel_values": [torch.zeros(3, 32, 32)] * count, "labels": [torch.zeros(32, 32).long()] * count}
        return {**made, **rows} if "at" in rows else rows

    table = Table.from_dict({"area": [1, 9] * 12, "at": list(range(24))})
    table.set_transform(decoded)
    settings = {"train_sampling_strategy": "group_by_length", "length_column_name": "area", "train_dataset": table}
    orders = []
    for name, build in (("stock", stock), ("ours", ours)):
        made = build(tmp_path / name, **settings)
        torch.manual_seed(3)
        orders.append(list(made._get_train_sampler()))
    assert orders[0] == orders[1] and {index % 2 for index in orders[1][:2]} == {1}


def test_columns_that_the_student_takes_are_kept(tmp_path: Path) -> None:
    made = detector_trainer(tmp_path, "conditional_detr", remove_unused_columns=True)
    sample = {**Boxed(1)[0], "pixel_mask": torch.ones(64, 96), "note": "x"}
    kept: list[set[str]] = []
    made.data_collator = lambda samples: kept.append(set(samples[0])) or {"pixel_values": torch.zeros(1, 3, 8, 8)}
    next(iter(made.get_test_dataloader([sample])))  # type: ignore[arg-type]
    assert kept == [{"pixel_values", "labels", "pixel_mask"}]


def test_a_search_trains_a_new_student_in_each_trial_and_minimises_the_evaluation_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Search:
        """What a backend does, without its package."""

        def ensure_available(self) -> None:
            pass

        def run(self, trainer: Any, n_trials: int, direction: str, **kwargs: Any) -> Any:
            found = []
            for number in range(n_trials):
                rate = [0.1, 0.1, 0.001][number]
                trainer.train(trial=SimpleNamespace(params={"learning_rate": rate}, number=number))
                metrics = trainer.evaluate()
                assert trainer.compute_objective(metrics) == metrics["eval_loss"]
                found.append((rate, metrics["eval_loss"]))
                trainer.model_wrapped = trainer.model = None  # as the backends do
            return found

    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial and trial.params)
    monkeypatch.setitem(transformers.trainer.ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, Search)
    made = taught(tmp_path, model=None, model_init=lambda trial: student(), eval_dataset=images(3))
    found = made.hyperparameter_search(lambda trial: trial.params, n_trials=3, backend="optuna")
    assert found[0] == found[1] and found[2][1] != found[0][1]


def test_the_card_takes_what_the_stock_trainer_takes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = taught(tmp_path, eval_dataset=images(2), eval_strategy="epoch")
    made.train()
    made.save_model()
    given = {"finetuned_from": "me/base", "dataset_tags": ["me/data"], "dataset": "Mine", "dataset_args": "split=1"}
    made.create_model_card(language="en", license="mit", tags="a", model_name="Named", tasks="segmenting", **given)
    card = (tmp_path / "README.md").read_text()
    for line in ("language: en", "license: mit", "- a", "- me/base", "- me/data", "name: Mine", "args: split=1"):
        assert line in card, line
    assert "type: segmenting" in card and "# Named" in card
    with caplog.at_level(logging.WARNING):
        made.create_model_card(tasks="segmenting")
    assert "the card has no scores that tasks could describe" in caplog.text
