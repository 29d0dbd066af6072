"""Methods and settings of the stock Trainer that pass something on: to accelerate, loaders, trackers, the Hub."""

from __future__ import annotations

import inspect
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import SwinConfig, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import HPSearchBackend

from cankd_hf.training import hub_mixin
from cankd_hf.training.trainer import CanKDTrainer

from .beside_stock import accuracy, images, ours, pixel_loss, stock
from .tiny_trainers import student, teacher, terms

TAUGHT: dict[str, Any] = {"terms": terms(), "max_steps": 2}
# Methods that the stock Trainer calls in a training, an evaluation and a prediction.
CALLED = [
    *("create_optimizer", "create_scheduler", "get_decay_parameter_names", "get_batch_samples", "training_step"),
    *("compute_loss", "log", "evaluation_loop", "prediction_step", "get_total_train_batch_size", "num_examples"),
    *("set_initial_training_values", "get_train_dataloader", "evaluate", "floating_point_ops"),
]


def recorder(base: Any, calls: list[tuple[str, list[str]]]) -> Any:
    """A subclass that notes which methods are called, and with which arguments."""

    def noted(name: str) -> Any:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            stock_method = getattr(Trainer, name)
            bound = inspect.signature(stock_method).bind(self, *args, **kwargs)
            given = {key for key, value in bound.arguments.items() if value is not None}
            calls.append((name, sorted(given - {"self"})))
            return getattr(super(made, self), name)(*args, **kwargs)

        return method

    made = type("Recorder", (base,), {name: noted(name) for name in CALLED})
    return made


def test_overridden_methods_are_called_with_what_the_stock_trainer_passes(tmp_path: Path) -> None:
    heard: dict[str, list[tuple[str, list[str]]]] = {"stock": [], "ours": []}
    for (name, calls), build, base in zip(heard.items(), (stock, ours), (Trainer, CanKDTrainer), strict=True):
        made = build(
            tmp_path / name,
            cls=recorder(base, calls),
            eval_dataset=images(3),
            compute_metrics=accuracy,
            compute_loss_func=pixel_loss,
        )
        made.train()
        made.evaluate()
        made.predict(images(2))
    assert heard["ours"] == heard["stock"] and {name for name, _ in heard["ours"]} == set(CALLED)


class OnlyStudent(CanKDTrainer):
    """An override that knows nothing of connectors."""

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.1)
        return self.optimizer


def test_an_optimizer_of_ones_own_method_moves_the_connectors(tmp_path: Path) -> None:
    made = ours(tmp_path, cls=OnlyStudent, teacher=teacher(), **TAUGHT, save_strategy="steps", save_steps=1)
    made.create_optimizer_and_scheduler(num_training_steps=4)
    before = {name: value.clone() for name, value in made.distiller.named_parameters()}
    made.train()
    moved = [name for name, value in made.distiller.named_parameters() if not torch.equal(value, before[name])]
    assert any(name.startswith("connectors.") for name in moved)
    again = ours(tmp_path / "again", cls=OnlyStudent, teacher=teacher(), **TAUGHT)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, value in again.distiller.named_parameters():
        assert torch.equal(value, made.distiller.get_parameter(name)), name


@pytest.mark.parametrize("drops", [[], [0.5]])
def test_a_schedule_is_made_for_the_optimizer_that_is_given(drops: list[float], tmp_path: Path) -> None:
    made = ours(tmp_path, lr_drops=drops)
    optimizer = torch.optim.SGD(made.model.parameters(), lr=0.5)
    schedule = made.create_scheduler(10, optimizer=optimizer)
    assert schedule.optimizer is optimizer and schedule is made.lr_scheduler


def test_keys_that_are_ignored_are_no_predictions(tmp_path: Path) -> None:
    shapes: list[Any] = []

    def seen(prediction: Any) -> dict[str, float]:
        found = prediction.predictions
        shapes.append(found.shape if isinstance(found, np.ndarray) else len(found))
        return {}

    for name, build in (("stock", stock), ("ours", ours)):
        model = student()
        model.config.output_hidden_states = True
        settings = {"eval_dataset": images(2), "compute_metrics": seen, "eval_strategy": "epoch", "max_steps": -1}
        made = build(tmp_path / name, model=model, num_train_epochs=1, **settings)
        made.train(ignore_keys_for_eval=["hidden_states"])
        assert "first_loss" in made.evaluate(metric_key_prefix="first")
        made.evaluate(images(2), ignore_keys=["hidden_states"])
        assert "last_loss" in made.predict(images(2), ["hidden_states"], metric_key_prefix="last").metrics
        made.predict(images(2))
    assert shapes == [(2, 4, 8, 8), 2, (2, 4, 8, 8), (2, 4, 8, 8), 2] * 2


def test_labels_may_have_other_names_for_own_metrics(tmp_path: Path) -> None:
    class Two(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {**images(2)[index], "depth": torch.full((2,), index)}

    def collate(samples: list[Any]) -> dict[str, Any]:
        return {key: torch.stack([sample[key] for sample in samples]) for key in ("pixel_values", "labels", "depth")}

    seen: list[Any] = []
    for name, build in (("stock", stock), ("ours", ours)):
        made = build(
            tmp_path / name,
            eval_dataset=Two(),
            data_collator=collate,
            compute_metrics=lambda prediction: seen.append(prediction.label_ids) or {},
            label_names=["labels", "depth"],
            remove_unused_columns=False,
        )
        made.evaluate()
    assert [len(labels) for labels in seen] == [2, 2]
    assert all(np.array_equal(one, other) for one, other in zip(*seen, strict=True))


def test_a_loss_function_counts_the_items_of_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for averaged in (True, False):
        made = ours(tmp_path / str(averaged), compute_loss_func=pixel_loss, average_tokens_across_devices=averaged)
        batch = made.data_collator([images(1)[0]])
        made.model.eval()
        for count in (1, 2):
            monkeypatch.setattr(type(made.accelerator), "num_processes", property(lambda self, n=count: n))
            found[averaged, count] = made.compute_loss(made.model, batch, num_items_in_batch=64).item()
    assert found[True, 2] == pytest.approx(2 * found[True, 1]) and found[False, 2] == found[False, 1]


def test_the_machine_gets_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ddp = {"bucket_cap_mb": 7, "broadcast_buffers": False, "static_graph": True, "find_unused_parameters": False}
    settings = {f"ddp_{key}": value for key, value in ddp.items()}
    dispatch = {"split_batches": True, "even_batches": True, "use_seedable_sampler": False}
    made = ours(tmp_path, **settings, ddp_timeout=77, torch_compile_backend="eager", accelerator_config=dispatch)
    handler = made.accelerator.ddp_handler
    assert {key: getattr(handler, key) for key in ddp} == ddp
    assert made.args.torch_compile and made.accelerator.state.dynamo_plugin.backend == "EAGER"
    assert made.accelerator.dataloader_config.split_batches and not made.accelerator.use_seedable_sampler
    assert made.args.ddp_timeout_delta.seconds == 77 and made.args.device.type == "cpu"
    compiled = ours(tmp_path, torch_compile_backend="eager", torch_compile_mode="reduce-overhead")
    assert compiled.accelerator.state.dynamo_plugin.mode == "reduce-overhead"
    switched: list[bool] = []
    monkeypatch.setattr("transformers.training_args.is_torch_tf32_available", lambda: True)
    monkeypatch.setattr("transformers.training_args.enable_tf32", switched.append)
    ours(tmp_path, tf32=True)
    assert switched == [True]
    assert ours(tmp_path, fp16=True).args.mixed_precision == "fp16"


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
def test_checkpointing_takes_its_settings_by_both_names(name: str, tmp_path: Path) -> None:
    if name not in TrainingArguments.__dataclass_fields__:
        pytest.skip("newer than this transformers")
    swin = SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=2, out_indices=[1, 2], image_size=32)
    made = ours(
        tmp_path,
        model=student(backbone_config=swin),
        teacher=teacher(),
        **TAUGHT,
        **{name: True, f"{name}_kwargs": {"use_reentrant": False}},
    )
    made.train()
    layers = [module for module in made.student.modules() if hasattr(module, "_gradient_checkpointing_func")]
    assert layers and layers[0]._gradient_checkpointing_func.keywords["use_reentrant"] is False


def test_loaders_get_their_settings(tmp_path: Path) -> None:
    made = ours(
        tmp_path,
        dataloader_num_workers=1,
        dataloader_prefetch_factor=3,
        dataloader_in_order=False,
        dataloader_multiprocessing_context="spawn",
    )
    made.args.dataloader_pin_memory = True
    for loader in (made.get_train_dataloader(), made.get_eval_dataloader(images(2))):
        assert loader.num_workers == 1 and loader.prefetch_factor == 3 and not loader.in_order and loader.pin_memory
        assert loader.multiprocessing_context.get_start_method() == "spawn"


def test_logging_is_as_loud_as_asked(tmp_path: Path) -> None:
    before = transformers.logging.get_verbosity()
    try:
        made = ours(tmp_path, log_level="error", log_level_replica="critical")
        assert transformers.logging.get_verbosity() == logging.ERROR
        args = made.args
        vars(args)["distributed_state"] = SimpleNamespace(process_index=2, local_process_index=0, num_processes=1)
        for each, loud in ((True, logging.ERROR), (False, logging.CRITICAL)):
            args.log_on_each_node = each
            assert args.get_process_log_level() == loud
            args.save_on_each_node = each
            made.save_model(str(tmp_path / str(each)))
            assert (tmp_path / str(each) / "model.safetensors").is_file() == each
    finally:
        transformers.logging.set_verbosity(before)


class Counting(TrainerCallback, ExportableState):
    """A callback whose state is saved."""

    def __init__(self, steps: int = 0) -> None:
        self.steps = steps

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps += 1

    def state(self) -> dict[str, Any]:
        return {"args": {"steps": self.steps}, "attributes": {}}


def test_states_of_callbacks_come_back_where_asked_for(tmp_path: Path) -> None:
    ours(tmp_path, callbacks=[Counting()], save_strategy="steps", save_steps=2).train()
    for asked, expected in ((True, 4), (False, 2)):
        made = ours(tmp_path / str(asked), callbacks=[Counting()], restore_callback_states_from_checkpoint=asked)
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        [counting] = [callback for callback in made.callback_handler.callbacks if isinstance(callback, Counting)]
        assert counting.steps == expected


def test_floating_point_operations_are_counted_as_for_the_student(tmp_path: Path) -> None:
    control, made = stock(tmp_path / "stock"), ours(tmp_path / "ours", teacher=teacher(), **TAUGHT)
    batch = {"pixel_values": images(2).images}
    assert made.floating_point_ops(batch) == control.floating_point_ops(batch) > 0
    made.model = made.build_distiller(student(fpn_channels=8))  # as a trial has
    assert made.floating_point_ops(batch) < control.floating_point_ops(batch)


def test_metrics_are_written_as_by_the_stock_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for name, build in (("stock", stock), ("ours", ours)):
        made = build(tmp_path / name)
        capsys.readouterr()
        made.log_metrics("eval", {"eval_loss": 0.5, "total_flos": 2 << 30})
        said.append(capsys.readouterr().out)
        made.save_metrics("eval", {"eval_loss": 0.5})
        made.save_metrics("test", {"test_loss": 1.5}, combined=False)
        assert json.loads((tmp_path / name / "all_results.json").read_text()) == {"eval_loss": 0.5}
        assert json.loads((tmp_path / name / "test_results.json").read_text()) == {"test_loss": 1.5}
    assert said[0] == said[1] and "eval_loss" in said[0]


def test_a_search_takes_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Search:
        def ensure_available(self) -> None:
            pass

        def run(self, trainer: Any, n_trials: int, direction: str, **kwargs: Any) -> str:
            seen.append((n_trials, direction, kwargs, trainer.hp_name(None), trainer.compute_objective({"a": 3.0})))
            return "best"

    monkeypatch.setitem(transformers.trainer.ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, Search)
    made = ours(tmp_path, model_init=lambda: student())
    best = made.hyperparameter_search(
        hp_space=dict,
        compute_objective=lambda metrics: metrics["a"],
        n_trials=5,
        direction="maximize",
        backend="optuna",
        hp_name=lambda trial: "name",
        timeout=9,
    )
    assert best == "best" and seen == [(5, "maximize", {"timeout": 9}, "name", 3.0)]


def test_a_push_takes_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    sent: list[Any] = []

    def open_repo(name: str, private: Any = None, revision: Any = None, token: Any = None) -> tuple[str, None]:
        opened.append((name, private, revision, token))
        return f"me/{name}", None

    monkeypatch.setattr(hub_mixin, "open_repo", open_repo)
    monkeypatch.setattr(hub_mixin, "plan", lambda *args: ["files"])
    monkeypatch.setattr(hub_mixin, "push", lambda *args: sent.append(("now", *args)))
    monkeypatch.setattr(hub_mixin, "push_in_background", lambda *args: sent.append(("later", *args)))
    made = ours(tmp_path, hub_model_id="student", teacher=teacher(), **TAUGHT)
    made.push_to_hub("First", True, "secret", "branch", True, model_name="Named")
    made.push_to_hub(commit_message="Second", blocking=False)
    assert opened == [("student", True, None, "secret"), ("me/student", None, "branch", "secret")]
    assert sent == [
        ("now", ["files"], "me/student", "First", "branch", "secret"),
        ("later", ["files"], "me/student", "Second", None, None),
    ]
    assert "# student" not in (tmp_path / "README.md").read_text()
    made.init_hf_repo(token="other", private=False)
    assert opened[-1] == ("student", False, None, "other")


def test_a_push_waits_for_the_one_before_unless_all_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[str] = []
    job = SimpleNamespace(done=lambda: False, result=lambda: None)
    monkeypatch.setattr(hub_mixin, "plan", lambda *args: ["files"])
    monkeypatch.setattr(hub_mixin, "push_in_background", lambda *args: pushed.append(args[2]) or job)
    for always, expected in ((False, 1), (True, 2)):
        pushed.clear()
        made = ours(tmp_path / str(always), hub_always_push=always)
        made.push_in_progress, made.hub_model_id = None, "me/student"
        for _ in range(2):
            made._push_from_checkpoint(str(tmp_path / "checkpoint-1"))
        assert len(pushed) == expected


def test_trackers_get_their_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cankd_hf.training.monitoring.trackers import GroupedTrackio

    asked: dict[str, Any] = {}
    package = SimpleNamespace(
        init=lambda **given: asked.update(given),
        freeze=lambda **given: asked.update(frozen=given) or "me/frozen",
        context_vars=SimpleNamespace(current_space_id=SimpleNamespace(get=lambda: "me/space")),
        config=SimpleNamespace(update=lambda *args, **kwargs: None, __setitem__=None),
        __version__="99",
    )
    made = ours(
        tmp_path,
        project="mine",
        trackio_space_id="me/space",
        trackio_bucket_id="me/bucket",
        trackio_static_space_id="me/still",
    )
    callback = GroupedTrackio.__new__(GroupedTrackio)
    vars(callback).update(_trackio=package, _initialized=False, _space_id=None, _static_space_id=None)
    package.config = type("Config", (dict,), {"update": lambda self, values, **_: None})()
    callback.setup(made.args, made.state, made.student)
    callback._freeze_space(made.args, made.student)
    assert (asked["project"], asked["space_id"], asked["bucket_id"]) == ("mine", "me/space", "me/bucket")
    assert asked["frozen"]["new_space_id"] == "me/still" and "trackio" in made.student.model_tags
