"""What people do with a Trainer: callbacks that save `model`, own metrics, predictions, searches, odd arguments."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers.trainer
from torch.utils.data import Dataset
from transformers import (
    AutoModelForSemanticSegmentation,
    ConvNextBackbone,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import HPSearchBackend
from transformers.utils import ModelOutput

from cankd_hf import FPNForSemanticSegmentation
from cankd_hf.errors import InputError
from cankd_hf.tasks import FeaturesTask, SegmentationTask, saved_task, task_for
from cankd_hf.training.arguments import CanKDConfig
from cankd_hf.training.trainer import CanKDTrainer

from .beside_stock import SETTINGS, accuracy, images, ours, stock, weights
from .detector_trainers import Boxed, detector_trainer
from .tiny_trainers import Images, largest_difference, student, teacher, terms, trainer


def taught(folder: Path, **settings: Any) -> CanKDTrainer:
    return ours(folder, **{"teacher": teacher(), "terms": terms(), "max_steps": 2, **settings})


class Unlabelled(Dataset):
    """The images of a data set alone."""

    def __init__(self, labelled: Any) -> None:
        self.labelled = labelled

    def __len__(self) -> int:
        return len(self.labelled)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.labelled[index]["pixel_values"]}


# Callbacks and the model


class SavesModel(TrainerCallback):
    """What trackers (W&B, DVCLive), users' callbacks and scripts do at the end of a training."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.save_pretrained(self.folder / "at-first")

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        fake = Trainer(
            args=copy.deepcopy(args), model=model, processing_class=kwargs["processing_class"], eval_dataset=["fake"]
        )
        fake.save_model(str(self.folder / "tracker"))
        model.save_pretrained(self.folder / "save_pretrained")
        model.config.save_pretrained(self.folder / "state_dict")
        torch.save(model.state_dict(), self.folder / "state_dict" / "pytorch_model.bin")


def test_what_callbacks_save_of_the_model_is_the_student(tmp_path: Path) -> None:
    made = taught(tmp_path, callbacks=[SavesModel(tmp_path)])
    made.train()
    made.model.save_pretrained(tmp_path / "trainer.model")
    made.model.save_pretrained(tmp_path / "given", state_dict=made.model.state_dict())
    pixels = images(2).images
    expected = made.student.eval()(pixels).logits
    for name in ("tracker", "save_pretrained", "state_dict", "trainer.model", "given"):
        loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / name).eval()
        assert torch.equal(loaded(pixels).logits, expected), name
    assert (tmp_path / "at-first" / "model.safetensors").is_file()


def test_the_model_has_what_scripts_ask_it_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = taught(tmp_path)
    pushed: list[Any] = []
    monkeypatch.setattr(type(made.student), "push_to_hub", lambda self, *args, **kwargs: pushed.append((self, args)))
    made.model.push_to_hub("me/student")
    made.model.add_model_tags("mine")
    assert pushed == [(made.student, ("me/student",))] and "mine" in made.student.model_tags
    model = made.model
    assert model.config is made.student.config and model.dtype == torch.float32
    assert model.num_parameters() == made.student.num_parameters()
    assert model.get_input_embeddings() is made.student.get_input_embeddings()


def test_outputs_are_those_of_a_model_of_transformers(tmp_path: Path) -> None:
    made = detector_trainer(tmp_path, "conditional_detr")
    batch = made.data_collator([Boxed(2)[0], Boxed(2)[1]])
    outputs = made.model(**batch)
    assert isinstance(outputs, ModelOutput) and outputs[0] is outputs.loss is outputs["loss"]
    assert outputs.logits.requires_grad and outputs["logits"] is outputs[1]
    assert outputs.pred_boxes is outputs["pred_boxes"] is outputs.outputs.pred_boxes
    with pytest.raises(AttributeError, match="no attribute 'logit'"):
        _ = outputs.logit
    with pytest.raises(KeyError):
        _ = outputs["logit"]
    with torch.no_grad():
        assert made.model(**made.data_collator([Unlabelled(Boxed(1))[0]]))[0].ndim == 3


def test_only_the_loss_holds_on_to_the_graph_where_nothing_else_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, kept = taught(tmp_path), []
    forward = made.model.forward
    monkeypatch.setattr(made.model, "forward", lambda **inputs: kept.append(forward(**inputs)) or kept[-1])
    made.train()
    assert kept and all(output.outputs is None and not output.logits.requires_grad for output in kept)


# Subclasses of students


class MyStudent(FPNForSemanticSegmentation):
    """A user's student."""


class MySegformer(SegformerForSemanticSegmentation):
    """A user's student on a native one, which is saved under other names than its modules have."""


@pytest.mark.parametrize("kind", [MyStudent, MySegformer])
def test_a_subclass_of_a_student_is_known_by_its_base(kind: Any, tmp_path: Path) -> None:
    segformer = SegformerConfig(
        hidden_sizes=[8] * 4, num_attention_heads=[1] * 4, depths=[1] * 4, decoder_hidden_size=8, num_labels=4
    )
    config = student().config if kind is MyStudent else segformer
    assert isinstance(task_for(kind(config)), SegmentationTask)
    made = [
        taught(tmp_path / name, model=kind(config), save_strategy="steps", save_steps=2, max_steps=4)
        for name in ("whole", "resumed")
    ]
    made[0].train()
    assert saved_task(str(tmp_path / "whole" / "checkpoint-4")) is SegmentationTask
    loaded = SegmentationTask.load(tmp_path / "whole" / "checkpoint-4")
    assert largest_difference(weights(made[0]), loaded.state_dict()) == 0
    made[1].train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert largest_difference(weights(made[0]), weights(made[1])) == 0


def test_a_student_of_no_known_class_is_found_in_the_facts_beside_it_or_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["MyOwn"], "model_type": "cankd_fpn"}))
    with pytest.raises(InputError, match="expected a student of one of the tasks .*, got 'MyOwn'"):
        saved_task(str(tmp_path))
    (tmp_path / "distillation.json").write_text(json.dumps({"task": "segmentation"}))
    assert saved_task(str(tmp_path)) is SegmentationTask
    (tmp_path / "distillation.json").write_text("{")
    with pytest.raises(InputError, match="distillation.json: expected the facts of a training, got none"):
        saved_task(str(tmp_path))


# Metrics and predictions


def test_own_metrics_get_logits_and_labels_with_a_teacher_too(tmp_path: Path) -> None:
    given = {"eval_dataset": images(3), "compute_metrics": accuracy}
    control, made = stock(tmp_path / "stock", **given), taught(tmp_path / "ours", **given)
    theirs, own = control.evaluate(), made.evaluate()
    assert own["eval_checksum"] == theirs["eval_checksum"] and own["eval_accuracy"] == theirs["eval_accuracy"]
    assert not any("miou" in key for key in own)
    made.compute_metrics = lambda prediction: {"later": float(prediction.predictions.sum())}
    assert "eval_later" in made.evaluate()
    made.preprocess_logits_for_metrics = lambda logits, labels: logits.argmax(1)
    assert made.predict(images(3)).predictions.shape == (3, 8, 8)


def test_our_scores_do_not_depend_on_how_the_trainer_collects(tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"batch_eval_metrics": True, "include_for_metrics": ["inputs", "loss"]},
        {"eval_do_concat_batches": False, "eval_accumulation_steps": 1},
        {"eval_use_gather_object": True, "dataloader_drop_last": True},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    ]
    found = []
    for number, more in enumerate(settings):
        made = taught(tmp_path / str(number), eval_dataset=images(5), per_device_eval_batch_size=2, **more)
        scores = made.evaluate()
        found.append(
            {key: value for key, value in scores.items() if key.startswith(("eval_iou", "eval_miou", "eval_loss"))}
        )
        assert made.args.batch_eval_metrics == more.get("batch_eval_metrics", False)
    assert all(scores == found[0] for scores in found) and len(found[0]) == 6


def test_the_last_images_count_in_scores_with_drop_last(tmp_path: Path) -> None:
    seen: list[int] = []
    made = taught(tmp_path, dataloader_drop_last=True, per_device_eval_batch_size=2, per_device_train_batch_size=4)
    made.compute_metrics = lambda prediction: seen.append(len(prediction.predictions)) or {}
    made.evaluate(images(5))
    made.predict(images(3))
    assert seen == [5, 3] and len(made.get_train_dataloader()) == 1


def test_persistent_workers_evaluate_the_data_set_that_is_given(tmp_path: Path) -> None:
    settings = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    made = taught(tmp_path, eval_dataset=images(5), **settings)
    first, other = made.evaluate(), made.evaluate(Images(3, size=32, noisy=False))
    assert other["eval_loss"] != first["eval_loss"] and made.evaluate()["eval_loss"] == first["eval_loss"]


def test_predictions_of_images_without_labels(tmp_path: Path) -> None:
    made = taught(tmp_path)
    whole, bare = made.predict(images(3)), made.predict(Unlabelled(images(3)))
    assert np.array_equal(whole.predictions, bare.predictions) and bare.label_ids is None
    assert {"test_loss", "test_miou"} <= whole.metrics.keys() and not {"test_loss", "test_miou"} & bare.metrics.keys()
    with pytest.raises(InputError, match="eval_dataset: expected images with labels to score, got a batch without"):
        made.evaluate(Unlabelled(images(3)))


@pytest.mark.parametrize("kind", ["retinanet", "conditional_detr"])
def test_predictions_of_detectors_are_batches_and_labels_stay_with_their_image(kind: str, tmp_path: Path) -> None:
    made = detector_trainer(tmp_path, kind, per_device_eval_batch_size=2)
    found = made.predict(Boxed(3))
    assert [len(batch) for batch in found.label_ids] == [2, 1]
    counts = [len(label["class_labels"]) for batch in found.label_ids for label in batch]
    assert counts == [1, 2, 3] and "test_ap" in found.metrics
    assert made.evaluate(Boxed(3))["eval_ap"] == found.metrics["test_ap"]
    shapes = {part.shape for part in found.predictions[1] if isinstance(part, np.ndarray)}
    assert any(shape[0] == 1 and shape[-1] == 4 for shape in shapes)
    bare = made.predict(Unlabelled(Boxed(3)))
    assert bare.label_ids is None and "test_ap" not in bare.metrics
    made.compute_metrics = lambda prediction: {"images": sum(map(len, prediction.label_ids))}
    assert made.evaluate(Boxed(3))["eval_images"] == 3 and made.args.eval_do_concat_batches


def test_predictions_of_a_backbone_are_its_maps_with_the_scores_of_its_task(tmp_path: Path) -> None:
    model = ConvNextBackbone(student().config.backbone_config)
    made = trainer(tmp_path, Unlabelled(Images(8)), model=model, task_weight=0.0)
    assert isinstance(made.task, FeaturesTask)
    found = made.predict(Unlabelled(Images(3)))
    assert [len(part) for part in found.predictions] == [3] * 4 and found.label_ids is None
    assert made.evaluate(Unlabelled(Images(3)))["eval_cka"] == found.metrics["test_cka"]


class Sizes(Images):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        side = 64 if index < 2 else 32
        return {key: value[..., :side, :side] for key, value in super().__getitem__(index).items()}


def test_predictions_of_several_sizes_are_a_list_or_refused(tmp_path: Path) -> None:
    made = taught(tmp_path, per_device_eval_batch_size=2)
    assert made.evaluate(Sizes(4))["eval_miou"] > 0
    with pytest.raises(InputError, match="eval_do_concat_batches: .*images differ in size"):
        made.predict(Sizes(4))
    made.args.eval_do_concat_batches = False
    assert [batch.shape[-1] for batch in made.predict(Sizes(4)).predictions] == [16, 8]


# Arguments


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
        return {"pixel_values": [torch.zeros(3, 32, 32)] * len(rows["at"]), **rows} if "at" in rows else rows

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
