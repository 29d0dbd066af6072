"""The same images give the same training, however they are batched, spread over processes, interrupted or compiled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MobileNetV2Config, MobileNetV2ForSemanticSegmentation, SwinConfig

from cankd_hf.errors import InputError
from cankd_hf.training.checkpoint_files import LIST_FILE
from tests.processes import run_two

from .detector_trainers import STUDENTS, detector_trainer, scores
from .test_conditioning import conditioned_trainer
from .test_conflict import guarded_trainer
from .test_thrift import averaged, thrifty_trainer
from .tiny_trainers import Images, largest_difference, of_shapes, student, teacher, terms, trainer, weights


def test_accumulation_equals_the_large_batch(tmp_path: Path) -> None:
    whole, halves = (
        trainer(tmp_path / "a"),
        trainer(tmp_path / "b", per_device_train_batch_size=4, gradient_accumulation_steps=2),
    )
    start = weights(whole)
    assert largest_difference(start, weights(halves)) == 0
    whole.train()
    halves.train()
    assert largest_difference(start, weights(whole)) > 1e-3, "nothing moved: the test would prove nothing"
    assert largest_difference(weights(whole), weights(halves)) < 1e-6
    # What is logged must agree too: unweighted means over the interval.
    for key in ("loss", "loss_task", "loss_cankd"):
        logged = [[entry[key] for entry in t.state.log_history if key in entry] for t in (whole, halves)]
        assert logged[0] == pytest.approx(logged[1], abs=1e-5) and len(logged[0]) == 2


def test_the_logged_loss_is_the_weighted_sum_of_its_parts(tmp_path: Path) -> None:
    made = trainer(tmp_path, task_weight=0.5)
    made.train()
    for entry in made.state.log_history[:2]:
        assert entry["loss"] == pytest.approx(0.5 * entry["loss_task"] + 2.0 * entry["loss_cankd"], rel=1e-4)
        assert {name for name in entry if name.startswith(("raw_", "branch_share/"))}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes left their weights and scores."""
    folder = tmp_path_factory.mktemp("two")
    run_two(Path(__file__).with_name("two_processes.py"), folder)
    return folder


@pytest.mark.parametrize("kind", ["fpn", "conditioned", "guarded", "thrifty", "unlabelled", *STUDENTS])
def test_two_processes_equal_one_with_the_double_batch(kind: str, two: Path, tmp_path: Path) -> None:
    """For FCOS where both have as many positive cells, as docs/detection.md says; for the others always."""
    if kind == "fpn":
        single = trainer(tmp_path, data=Images(16, noisy=True))
    elif kind == "unlabelled":  # with pictures that are mixed and erased, the same pairs in both
        single = of_shapes(tmp_path, (1.0, 1.0), erase=[0.5])
    elif kind == "conditioned":
        single = conditioned_trainer(tmp_path, 8)
    elif kind == "guarded":
        single = guarded_trainer(tmp_path, 8)
    elif kind == "thrifty":
        single = thrifty_trainer(tmp_path, 8)
    else:
        single = detector_trainer(tmp_path, kind)
    start = weights(single)
    single.train()
    ranks = [load_file(two / f"{kind}{rank}.safetensors") for rank in range(2)]
    assert largest_difference(ranks[0], ranks[1]) == 0
    if kind == "thrifty":
        averages = [{name: rank.pop(name) for name in averaged(single)} for rank in ranks]
        assert largest_difference(averages[0], averages[1]) == 0
        assert largest_difference(averages[0], averaged(single)) < 1e-6
    assert largest_difference(start, ranks[0]) > 1e-3, "nothing moved: the test would prove nothing"
    assert largest_difference(weights(single), ranks[0]) < 1e-6
    if kind == "fpn":
        found = json.loads((two / "scores.json").read_text())
        assert found["miou"] == pytest.approx(single.evaluate(Images(13))["eval_miou"], abs=1e-6)
        assert len(found["data_wait"]) == 2 and all(0 <= share <= 1 for share in found["data_wait"])


def test_two_processes_score_detections_as_one(two: Path, tmp_path: Path) -> None:
    found, one = json.loads((two / "scores.json").read_text()), scores(tmp_path, batch_size=4)
    assert 0.2 < one["eval_ap50"] < 0.95 and one.keys() < found.keys()
    assert {key: found[key] for key in one} == pytest.approx(one, abs=1e-6, nan_ok=True)


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "optim": "adamw_torch", "learning_rate": 1e-3}
    settings |= {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "linear"}
    schedule = terms(warmup=4.0, decay=2.0)
    data = Images(16, noisy=True)
    whole = trainer(tmp_path / "whole", data, terms=schedule, **settings)
    whole.train()
    resumed = trainer(tmp_path / "resumed", data, terms=schedule, model=student(seed=5), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert largest_difference(weights(whole), weights(resumed)) == 0
    last = [t.state.log_history[-2]["loss_cankd"] for t in (whole, resumed)]
    assert last[0] == last[1]


def test_a_resumed_run_equals_the_uninterrupted_one_with_workers(tmp_path: Path) -> None:
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2}
    settings |= {"dataloader_num_workers": 1}
    data = Images(16, noisy=True)
    whole = trainer(tmp_path / "whole", data, **settings)
    whole.train()
    resumed = trainer(tmp_path / "resumed", data, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert largest_difference(weights(whole), weights(resumed)) == 0


def test_the_teacher_is_bit_equal_afterwards_and_never_in_training_mode(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    before = {name: value.clone() for name, value in made.teacher.state_dict().items()}
    images = Images(2).images
    first = made.teacher(images)
    made.train()
    assert largest_difference(before, dict(made.teacher.state_dict())) == 0
    assert not any(module.training for module in made.teacher.modules())
    assert not any(parameter.requires_grad for parameter in made.teacher.parameters())
    for a, b in zip(first, made.teacher(images), strict=True):
        assert torch.equal(a, b)
    assert not any("teacher" in name for name, _ in made.model.named_parameters())


def test_the_teacher_does_not_run_while_every_weight_is_zero(tmp_path: Path) -> None:
    calls = []
    frozen = teacher()
    frozen.register_forward_hook(lambda *_: calls.append(1))
    made = trainer(tmp_path, teacher=frozen, terms=terms(decay=3.0), max_steps=5)
    calls.clear()
    made.train()
    assert len(calls) == 5
    never = trainer(tmp_path / "never", teacher=frozen, terms=terms(weight=0.0))
    calls.clear()
    never.train()
    assert not calls
    late = trainer(tmp_path / "late", teacher=frozen, terms=terms(warmup=2.0), max_steps=3)
    calls.clear()
    late.train()
    assert len(calls) == 2, "at step 0 of a warm-up the weight is 0"


def test_connectors_and_losses_are_optimised_clipped_and_saved(tmp_path: Path) -> None:
    made = trainer(tmp_path, save_strategy="steps", save_steps=2, weight_decay=0.1, max_grad_norm=1e-4, max_steps=3)
    start = weights(made)
    made.train()
    moved = weights(made)
    decayed = made.get_decay_parameter_names(made.model)
    assert any(name.startswith("losses.") for name in decayed) and any(
        name.startswith("connectors.") for name in decayed
    )
    optimised = {id(p) for group in made.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in made.model.parameters()} <= optimised
    assert max((moved[n] - start[n]).abs().max().item() for n in moved if n.startswith("connectors.")) > 0
    # The clipped norm counts them: two steps of lr 0.05 with a norm of 1e-4 move nothing further than that.
    assert largest_difference(start, moved) < 0.05 * (3 * 1e-4 + 3 * 0.1)
    saved = load_file(tmp_path / "checkpoint-2" / "distiller.safetensors")
    assert all(name.startswith(("connectors.", "losses.")) for name in saved) and saved
    student_keys = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(name.startswith(("backbone.", "neck.", "head.")) for name in student_keys)
    assert not list(tmp_path.rglob("training_args.bin"))


def test_load_best_model_at_end_loads_what_it_says(tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        eval_dataset=Images(6),
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="miou",
        greater_is_better=True,
    )
    made.train()
    best = Path(made.state.best_model_checkpoint)
    saved = {f"student.{k}": v for k, v in load_file(best / "model.safetensors").items()}
    saved |= load_file(best / "distiller.safetensors")
    assert largest_difference(saved, weights(made)) == 0
    assert made.evaluate()["eval_miou"] == pytest.approx(made.state.best_metric)


def test_resuming_with_another_teacher_or_other_terms_is_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path / "a", save_strategy="steps", save_steps=1)
    made.train()
    checkpoint = str(tmp_path / "a" / "checkpoint-1")
    with pytest.raises(InputError, match="another teacher"):
        trainer(tmp_path / "b", teacher=teacher(seed=9)).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(InputError, match="other terms"):
        trainer(tmp_path / "c", terms=terms(loss="instance_mse", options={})).train(resume_from_checkpoint=checkpoint)
    extra = load_file(tmp_path / "a" / "checkpoint-1" / "model.safetensors")
    save_file({**extra, "surplus": torch.zeros(1)}, tmp_path / "a" / "checkpoint-1" / "model.safetensors")
    (tmp_path / "a" / "checkpoint-1" / LIST_FILE).unlink()  # as an earlier version left it
    with pytest.raises(InputError, match="surplus"):
        trainer(tmp_path / "d").train(resume_from_checkpoint=checkpoint)


def test_bf16_runs_and_stays_close(tmp_path: Path) -> None:
    full, half = trainer(tmp_path / "a"), trainer(tmp_path / "b", bf16=True)
    full.train()
    half.train()
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (full, half)]
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    assert all(value.dtype == torch.float32 for value in weights(half).values() if value.is_floating_point())


@pytest.mark.slow
def test_torch_compile_gives_the_same_training(tmp_path: Path) -> None:
    plain, compiled = trainer(tmp_path / "a"), trainer(tmp_path / "b", torch_compile=True)
    plain.train()
    compiled.train()
    assert largest_difference(weights(plain), weights(compiled)) < 1e-4
    compiled.save_model(str(tmp_path / "saved"))
    assert all(not name.startswith("_orig_mod") for name in load_file(tmp_path / "saved" / "model.safetensors"))


SWIN = SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2, drop_path_rate=0.0)


@pytest.mark.parametrize("more", [{"backbone_config": SWIN}, {}], ids=["its own", "as a whole"])
def test_gradient_checkpointing_gives_the_same_training(more: dict[str, Any], tmp_path: Path) -> None:
    plain = trainer(tmp_path / "a", model=student(**more))
    saved = trainer(tmp_path / "b", model=student(**more), activation_checkpointing=True)
    plain.train()
    saved.train()
    assert saved.student.is_activation_checkpointing
    assert largest_difference(weights(plain), weights(saved)) < 1e-6


def test_a_student_that_cannot_checkpoint_activations_says_so(tmp_path: Path) -> None:
    native = MobileNetV2ForSemanticSegmentation(MobileNetV2Config(depth_multiplier=0.1, min_depth=4, num_labels=4))
    with pytest.raises(InputError, match="activation_checkpointing"):
        trainer(tmp_path, model=native, teacher=None, terms=None, activation_checkpointing=True).train()
