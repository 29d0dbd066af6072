"""Callbacks that save `model`, scripts that use `trainer.model`, and students that users derive from ours."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSemanticSegmentation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    Trainer,
    TrainerCallback,
)
from transformers.utils import ModelOutput

from cankd_hf import FPNForSemanticSegmentation
from cankd_hf.errors import InputError
from cankd_hf.tasks import SegmentationTask, saved_task, task_for

from .beside_stock import Unlabelled, images, taught, weights
from .detector_trainers import Boxed, detector_trainer
from .tiny_trainers import largest_difference, student


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
