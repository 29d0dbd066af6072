"""The objective as a value: several teachers, logits, losses of one's own, frozen parts, one after another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import set_seed

from cankd_hf import LossTerm, Objective, TeacherOutput, load_teacher
from cankd_hf.errors import InputError
from cankd_hf.losses.base import FeatureLoss, LogitsLoss
from cankd_hf.models.fpn.configuration_cankd_fpn import FPNConfig
from cankd_hf.models.fpn.modeling_cankd_fpn import FPNForSemanticSegmentation
from cankd_hf.teachers.teacher import Teacher
from cankd_hf.training.placing import Placed
from cankd_hf.training.predicting import Answers, compared_logits

from .tiny_trainers import Images, largest_difference, student, teacher, terms, trainer, weights


class KL(LogitsLoss):
    """The textbook loss on logits."""

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        ours, theirs = student.log_softmax(1), teacher.log_softmax(1)
        return (theirs.exp() * (theirs - ours)).sum(1).mean()


class L1(FeatureLoss):
    """A loss on maps in one line."""

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).abs().mean()


class Scaled(nn.Module):
    """A loss that knows nothing of cankd_hf."""

    def __init__(self, power: float = 2.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.power = power

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (self.scale * student - teacher).abs().pow(self.power).mean()


def segmenter(labels: int = 4, seed: int = 3) -> Teacher:
    """A teacher with a head."""
    backbone = student().config.backbone_config
    set_seed(seed)
    config = FPNConfig(backbone_config=backbone, fpn_channels=16, head_channels=16, norm="group", num_labels=labels)
    return load_teacher(FPNForSemanticSegmentation(config))


def losses(made: Any) -> list[dict[str, float]]:
    """What was logged of the losses, step by step."""
    history = [entry for entry in made.state.log_history if "loss" in entry]
    return [{key: value for key, value in entry.items() if key.startswith("loss")} for entry in history]


def test_one_teacher_in_a_dictionary_is_that_teacher_alone(tmp_path: Path) -> None:
    alone = trainer(tmp_path / "a")
    named = trainer(tmp_path / "b", teacher=None, teachers={"dino": teacher()})
    for made in (alone, named):
        made.train()
    assert losses(alone) == losses(named)
    assert largest_difference(weights(alone), weights(named)) == 0


def test_each_term_learns_from_its_teacher_and_each_teacher_runs_once(tmp_path: Path) -> None:
    calls: list[str] = []
    dino, seg = teacher(), segmenter()
    dino.register_forward_hook(lambda *_: calls.append("dino"))
    seg.register_forward_hook(lambda *_: calls.append("seg"))
    given = [
        LossTerm(loss="instance_mse", weight=1.0, teacher="dino"),
        LossTerm(loss=L1, weight=1.0, teacher="seg", pairs=[[0, 0], [1, 1]], decay=3.0),
        LossTerm(loss=KL, weight=0.5, teacher="seg", decay=3.0),
    ]
    made = trainer(tmp_path, teacher=None, teachers={"dino": dino, "seg": seg}, terms=given, max_steps=4)
    calls.clear()
    made.train()
    # The decay ends after step 4; before it both teachers run once a step, and nothing runs in between.
    assert calls == ["dino", "seg"] * 4
    assert set(made.distiller.connectors) == {item.pair.name for item in made.distiller.placed if item.pair}
    assert all(name.startswith(("dino_", "seg_")) for name in made.distiller.connectors)
    first = losses(made)[0]
    assert {"loss_task", "loss_instance_mse", "loss_L1", "loss_L1/seg_s0t0", "loss_KL"} <= first.keys()
    total = first["loss_task"] + first["loss_instance_mse"] + first["loss_L1"] + 0.5 * first["loss_KL"]
    assert first["loss"] == pytest.approx(total, rel=1e-4)


def test_a_run_with_two_teachers_resumes_bit_for_bit(tmp_path: Path) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "teacher": None}
    given = [LossTerm(loss="instance_mse", teacher="a"), LossTerm(loss=KL, teacher="b"), *terms(teacher="b")]
    made = [
        trainer(tmp_path / name, teachers={"a": teacher(), "b": segmenter()}, terms=given, **settings)
        for name in ("whole", "resumed")
    ]
    made[0].train()
    made[1].train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert largest_difference(weights(made[0]), weights(made[1])) == 0
    other = trainer(tmp_path / "c", teachers={"a": teacher(), "b": segmenter(seed=5)}, terms=given, **settings)
    with pytest.raises(InputError, match="another teacher"):
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


def test_teachers_and_terms_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    two = {"a": teacher(), "b": segmenter()}
    with pytest.raises(InputError, match="expected one of a, b, got None"):
        trainer(tmp_path, teacher=None, teachers=two)
    with pytest.raises(InputError, match="expected one of a, b, got c"):
        trainer(tmp_path, teacher=None, teachers=two, terms=terms(teacher="c"))
    with pytest.raises(InputError, match="got both"):
        trainer(tmp_path, teachers=two)
    with pytest.raises(InputError, match="objective: expected terms"):
        trainer(tmp_path, objective=Objective(1.0, terms()))


def test_a_teacher_whose_logits_are_read_runs_to_its_head_with_the_same_maps() -> None:
    seg, images = segmenter(), Images(2).images
    ran: list[int] = []
    seg.model.head.register_forward_hook(lambda *_: ran.append(1))
    short = seg(images)
    assert short.logits is None and not ran
    seg.reads_logits = True
    whole = seg(images)
    assert isinstance(whole, TeacherOutput) and len(ran) == 1
    assert whole.logits is not None and whole.logits.shape[:2] == (2, 4) and not whole.logits.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(short.maps, whole.maps, strict=True))


def test_logits_get_no_connector_and_other_classes_are_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path, teacher=segmenter(), terms=[LossTerm(loss=KL)])
    assert len(made.distiller.connectors) == 0 and made.teacher is not None and made.teacher.reads_logits
    made.train()
    assert losses(made)[0]["loss_KL"] > 0
    with pytest.raises(InputError, match="4 of the student and 7 of the teacher"):
        trainer(tmp_path, teacher=segmenter(labels=7), terms=[LossTerm(loss=KL)])
    with pytest.raises(InputError, match="none from teacher;"):
        trainer(tmp_path, terms=[LossTerm(loss=KL)])
    with pytest.raises(InputError, match="reads logits; leave pairs out"):
        trainer(tmp_path, teacher=segmenter(), terms=[LossTerm(loss=KL, pairs=[[0, 0]])])


@pytest.mark.parametrize("loss", [L1, L1(32), Scaled, Scaled(1.0)], ids=["class", "module", "any class", "any module"])
def test_a_loss_of_ones_own_needs_no_edit_of_ours(loss: Any, tmp_path: Path) -> None:
    made = trainer(tmp_path, terms=[LossTerm(loss=loss, weight=1.0, name="mine")])
    before = weights(made)
    made.train()
    assert all(entry["loss_mine"] > 0 for entry in losses(made))
    moved = {name for name, value in weights(made).items() if not torch.equal(value, before[name])}
    own = {name for name in before if name.startswith("losses.mine")}
    assert own <= moved and bool(own) == (not isinstance(loss, L1) and loss is not L1)
    pairs = len(made.distiller.placed)
    assert pairs == 2 and len({id(item.loss) for item in made.distiller.placed}) == pairs


def test_options_that_a_loss_does_not_take_are_refused_and_its_own_bugs_are_not_hidden(tmp_path: Path) -> None:
    class Broken(FeatureLoss):
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            len(3)  # type: ignore[arg-type]

    with pytest.raises(InputError, match="terms.L1.options: L1: got an unexpected keyword argument 'power'"):
        trainer(tmp_path, terms=[LossTerm(loss=L1, options={"power": 2})])
    with pytest.raises(TypeError, match="has no len"):
        trainer(tmp_path, terms=[LossTerm(loss=Broken)])


def test_options_beside_a_module_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="terms.Scaled.options: expected none beside a module"):
        trainer(tmp_path, terms=[LossTerm(loss=Scaled(), options={"power": 3.0})])


def test_an_objective_without_terms_saves_into_the_folder_of_one_with_terms(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_miou", "eval_dataset": Images(4)}
    made = trainer(tmp_path, **settings)
    made.train()
    assert (tmp_path / "checkpoint-2" / "distiller.safetensors").is_file()
    made.set_objective(Objective(1.0))
    made.train()
    assert not (tmp_path / "checkpoint-2" / "distiller.safetensors").exists()


def test_new_terms_get_synchronised_batchnorm_too(tmp_path: Path) -> None:
    made = trainer(tmp_path, terms=[], sync_batchnorm=True)
    made.set_objective(Objective(1.0, [LossTerm()]))
    norms = [
        module for module in made.distiller.losses.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    assert norms and all(isinstance(module, nn.SyncBatchNorm) for module in norms)


def test_frozen_parts_keep_weights_and_running_statistics(tmp_path: Path) -> None:
    model = student(norm="batch")
    given = terms(options={})
    made = trainer(tmp_path, model=model, terms=None, objective=Objective(1.0, given, frozen=["neck", "head"]))
    before = weights(made)
    made.train()
    after = weights(made)
    frozen = [name for name in before if name.startswith(("student.neck", "student.head"))]
    assert any("running_mean" in name for name in frozen)
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("running_mean" in name for name in moved) and any(name.startswith("student.backbone") for name in moved)
    with pytest.raises(InputError, match="no module 'nek'; did you mean 'neck'"):
        made.set_objective(Objective(1.0, terms(), frozen=["nek"]))


def test_a_frozen_batchnorm_is_frozen_when_it_is_synchronised_too(tmp_path: Path) -> None:
    objective = Objective(1.0, terms(), frozen=["head.context.norm"])
    made = trainer(tmp_path, model=student(norm="batch"), terms=None, objective=objective, sync_batchnorm=True)
    made.model.train()
    norm = made.student.get_submodule("head.context.norm")
    assert isinstance(norm, nn.SyncBatchNorm) and not norm.training
    assert not any(parameter.requires_grad for parameter in norm.parameters())


def test_a_new_objective_between_two_trainings(tmp_path: Path) -> None:
    """What a phase is: features first, then the task with part of the student frozen; connectors are carried."""
    made = trainer(tmp_path, terms=None, objective=Objective(0.0, terms()))
    made.train()
    assert all("loss_task" not in entry for entry in losses(made))
    first, optimizer = weights(made), made.optimizer
    made.set_objective(Objective(1.0, [*terms(weight=1.0), LossTerm(loss=L1, weight=0.1)], frozen=["backbone"]))
    carried = weights(made)
    assert all(torch.equal(first[name], carried[name]) for name in first)
    assert carried.keys() == first.keys(), "L1 has no weights, and shares the connectors"
    made.train()
    assert made.optimizer is not optimizer and {"loss_task", "loss_cankd", "loss_L1"} <= losses(made)[0].keys()
    second = weights(made)
    assert all(torch.equal(first[name], second[name]) for name in first if name.startswith("student.backbone"))
    assert not torch.equal(first["losses.cankd.0.w.weight"], second["losses.cankd.0.w.weight"])
    made.set_objective(Objective(1.0))
    made.train()
    assert not made.distiller.connectors and losses(made)[0].keys() == {"loss", "loss_task"}
    third = weights(made)
    assert any(not torch.equal(second[name], third[name]) for name in third if name.startswith("student.backbone"))


def test_modules_of_a_new_objective_are_as_the_arguments_ask(tmp_path: Path) -> None:
    made = trainer(tmp_path, terms=[], teacher=teacher(), sync_batchnorm=True)
    made.set_objective(Objective(1.0, terms(options={})))
    assert all(isinstance(item.loss.output_norm, nn.SyncBatchNorm) for item in made.distiller.placed)


def test_two_terms_of_one_name_and_nothing_to_train_are_refused() -> None:
    with pytest.raises(InputError, match="two terms are called 'cankd'"):
        Objective(1.0, [*terms(), *terms()])
    with pytest.raises(InputError, match="0 leaves nothing to train"):
        Objective(0.0)
    with pytest.raises(InputError, match="at least 0, got -1"):
        Objective(-1.0)


def test_one_module_in_two_terms_is_copied(tmp_path: Path) -> None:
    given = Scaled()
    pair = {"loss": given, "weight": 1.0, "pairs": [[2, 0]]}
    made = trainer(tmp_path, terms=[LossTerm(**pair, name="a"), LossTerm(**pair, name="b")], save_steps=1)
    made.args.save_strategy = "steps"
    made.train()
    first, second = (item.loss for item in made.distiller.placed)
    assert first is given and second is not given and (tmp_path / "checkpoint-1" / "distiller.safetensors").is_file()


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"frozen: expected a list, got 'backbone'; write \['backbone'\]"):
        Objective(1.0, terms(), frozen="backbone")
    with pytest.raises(InputError, match="terms: expected a list"):
        Objective(1.0, LossTerm())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="loss: expected a name, a class or an nn.Module, got 3"):
        trainer(tmp_path, terms=[LossTerm(loss=3)])  # type: ignore[arg-type]
    for name, said in (("a.b", "without dots"), ("task", "other than `task`"), ("values", "attribute of this name")):
        with pytest.raises(InputError, match=said):
            trainer(tmp_path, terms=[LossTerm(name=name)])
    for weight in (float("inf"), float("nan"), "1"):
        with pytest.raises(InputError, match="task_weight: expected a finite number of at least 0"):
            Objective(weight)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="terms: expected a list of LossTerm, got 'cankd' in it"):
        Objective(1.0, ["cankd"])  # type: ignore[list-item]
    with pytest.raises(InputError, match="frozen: expected a list of str, got 3 in it"):
        Objective(1.0, terms(), frozen=[3])  # type: ignore[list-item]
    alone = trainer(tmp_path, teacher=None, terms=None)
    with pytest.raises(InputError, match="frozen: expected something left to train"):
        alone.set_objective(Objective(1.0, frozen=[name for name, _ in alone.student.named_children()]))
    with pytest.raises(InputError, match="needs a teacher, and there is none"):
        alone.set_objective(Objective(1.0, terms()))
    flat = trainer(tmp_path, terms=[LossTerm(loss=nn.MSELoss(reduction="none"), name="flat")])
    with pytest.raises(InputError, match="distill.terms.flat.loss: MSELoss: expected one number, got"):
        flat.train()
    made = trainer(tmp_path)
    made.source = lambda batch, names=None: {}
    with pytest.raises(InputError, match="source: expected outputs of teacher, got none of teacher"):
        made.train()


def test_logits_of_other_queries_are_refused() -> None:
    given = LossTerm(loss=KL)
    item = Placed(given, "teacher", None, 1.0, KL(3))
    teacher_output = TeacherOutput([], torch.zeros(2, 5, 3))
    student = nn.Identity()
    same = compared_logits(item, Answers(student, logits=torch.zeros(2, 5, 3)), teacher_output)
    assert same is not None and same.teacher is teacher_output.logits
    with pytest.raises(InputError, match=r"query with query, .* \[2, 8, 3\] in training and the teacher \[2, 5, 3\]"):
        compared_logits(item, Answers(student, logits=torch.zeros(2, 8, 3)), teacher_output)
    with pytest.raises(InputError, match="the student gives none in training"):
        compared_logits(item, Answers(student), teacher_output)
