"""Numbers that are not finite stop a run, or are skipped and told; they are never saved, scored or pushed."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSemanticSegmentation, SegformerConfig
from transformers.trainer_utils import get_last_checkpoint

from cankd_hf import evaluate, push
from cankd_hf.config.distill import LossTerm
from cankd_hf.errors import InputError
from cankd_hf.export.source import load as load_to_export
from cankd_hf.training.finite_scores import ScoreGuard
from cankd_hf.training.trainer import CanKDTrainer
from tests.processes import run_two

from .tiny_trainers import CLASSES, Images, largest_difference, student, teacher, trainer, weights


class Bad(Images):
    """Images of which some are NaN."""

    def __init__(self, count: int, bad: set[int]) -> None:
        super().__init__(count)
        self.bad = bad

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = super().__getitem__(index)
        return {**item, "pixel_values": item["pixel_values"] * float("nan")} if index in self.bad else item


class Breaking(nn.Module):
    """A loss on maps whose value, or only its gradient, is not finite in the given calls."""

    def __init__(self, calls: set[int], gradient_only: bool = False) -> None:
        super().__init__()
        self.calls, self.gradient_only, self.count = calls, gradient_only, 0

    def forward(self, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        self.count += 1
        if self.count not in self.calls:
            return ours.square().mean()
        # The square root of 0 is finite, its slope is not.
        return (ours * 0).sum().sqrt() if self.gradient_only else ours.mean() * float("nan")


def breaking(folder: Path, calls: set[int], gradient_only: bool = False, **settings: Any) -> CanKDTrainer:
    """A trainer whose only distillation loss breaks in some of its steps."""
    given = [LossTerm(loss=Breaking(calls, gradient_only), name="breaks", pairs=[[3, 0]])]
    return trainer(folder, terms=given, max_steps=settings.pop("max_steps", 4), **settings)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING)
    return caplog


def test_a_teacher_with_a_nan_is_named_with_tap_and_image(tmp_path: Path) -> None:
    for value, text in ((float("nan"), "parameters"), (float("inf"), "parameters"), (1e20, "parameters")):
        bad = teacher()
        with torch.no_grad():
            for parameter in bad.model.parameters():
                if value == 1e20:
                    parameter.mul_(value)
                else:
                    parameter.view(-1)[0] = value
        made = trainer(tmp_path, teacher=bad, data=Images(8))
        before = weights(made)
        with pytest.raises(InputError, match=r"^teacher: .* at tap stage2 for image \d of the training set"):
            made.train()
        assert largest_difference(weights(made), before) == 0, text


def test_one_bad_image_is_named_also_where_the_flags_are_read_later(tmp_path: Path) -> None:
    for late in (False, True):
        made = trainer(tmp_path, data=Bad(16, {13}), per_device_train_batch_size=16, logging_steps=10)
        made.guard.late = late
        before = weights(made)
        with pytest.raises(InputError, match="teacher: .*for image 13 of the training set"):
            made.train()
        counted = {name for name in before if "num_batches" in name}
        left = {name: value for name, value in weights(made).items() if name not in counted}
        assert largest_difference(left, {name: before[name] for name in left}) == 0


@pytest.mark.parametrize(
    ("optim", "late", "gradient_only"),
    [
        ("sgd", True, False),
        ("adamw_torch", True, True),
        ("adamw_torch_fused", True, False),
        ("adamw_torch_fused", False, True),
    ],
)
def test_a_bad_step_changes_nothing_and_is_told(
    optim: str, late: bool, gradient_only: bool, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    def run(calls: set[int], steps: int, **settings: Any) -> CanKDTrainer:
        made = breaking(tmp_path, calls, optim=optim, max_steps=steps, model=student(norm="batch"), **settings)
        made.guard.late = late
        made.train()
        return made

    good, made = run(set(), 1), run({2, 3}, 3, gradient_only=gradient_only)
    expected = {name: value for name, value in weights(good).items() if "num_batches" not in name}
    found = {name: weights(made)[name] for name in expected}
    assert largest_difference(found, expected) == 0, "two bad steps after a good one leave what the good one made"
    what = "the gradient" if gradient_only else "the loss (breaks/s3t0)"
    assert log.text.count(f"step 2: {what} is not finite; its update is skipped") == 1
    assert "2 of 3 steps were skipped" in log.text
    lines = [entry for entry in made.state.log_history if "learning_rate" in entry]
    assert len(lines) == 3 and all(value == value for entry in lines for value in entry.values())


def test_the_first_step_of_an_optimizer_is_skipped_too(tmp_path: Path) -> None:
    for optim in ("sgd", "adamw_torch"):
        made = breaking(tmp_path, {1}, optim=optim, max_steps=1, optim_args="momentum=0.9" if optim == "sgd" else None)
        made.guard.late = True
        before = weights(made)
        with pytest.raises(InputError, match="got none in 1 steps"):
            made.train()
        assert largest_difference(weights(made), before) == 0
        states = [value for state in made.optimizer.state.values() for value in state.values()]
        assert all(bool((torch.as_tensor(value) == 0).all()) for value in states if getattr(value, "ndim", 0))


def test_bad_steps_in_a_row_stop_the_run_and_name_the_last_good_checkpoint(tmp_path: Path) -> None:
    made = breaking(tmp_path, {3, 4, 5}, max_steps=9, save_strategy="steps", save_steps=1)
    with pytest.raises(InputError, match=r"loss \(breaks/s3t0\) in 3 of 3 steps up to step 5.*checkpoint-2$"):
        made.train()
    assert get_last_checkpoint(str(tmp_path)) is not None
    breaking(tmp_path / "apart", {2, 4, 6}, max_steps=7).train()
    with pytest.raises(InputError, match="1 of 1 steps up to step 2"):
        breaking(tmp_path / "strict", {2}, max_nonfinite_steps=1).train()
    with pytest.raises(InputError, match=r"training\.max_nonfinite_steps: expected a whole number of at least 1, got"):
        breaking(tmp_path, set(), max_nonfinite_steps=0)


def test_accumulated_batches_are_skipped_together(tmp_path: Path) -> None:
    made = breaking(
        tmp_path, {4}, max_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=4, max_grad_norm=0.0
    )
    made.train()
    one = breaking(
        tmp_path, set(), max_steps=1, gradient_accumulation_steps=2, per_device_train_batch_size=4, max_grad_norm=0.0
    )
    one.train()
    assert largest_difference(weights(made), weights(one)) == 0 and made.guard.skipped == 1


def test_the_search_for_a_scale_of_fp16_does_not_count(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    for scale, flag in ((65536.0, 0), (1.0, 0), (0.5, 1)):
        made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        made.accelerator.scaler.scale(torch.ones(()))  # which makes its tensor
        made.guard._flags.clear()
        made.guard.see_norm(torch.tensor(float("inf")))
        assert int(made.guard._flags["gradient"]) == flag
    assert made.guard.see_loss(torch.tensor(float("nan"))) == 0 and int(made.guard._flags["loss"]) == 1


def test_a_loss_known_to_be_finite_is_a_tensor_like_any(tmp_path: Path) -> None:
    guard = trainer(tmp_path, teacher=None, terms=[]).guard
    guard.late = True  # as on CUDA
    loss = guard.see_loss(torch.tensor(2.0))
    assert not torch.isnan(loss) and not torch.isinf(loss) and f"{loss:.1f}" == "2.0"
    assert copy.deepcopy(loss) == pickle.loads(pickle.dumps(loss)) == 2 and type(loss + 1) is torch.Tensor
    loss *= float("nan")
    assert torch.isnan(loss)


def test_a_mean_of_the_log_is_of_the_finite_steps(tmp_path: Path) -> None:
    made = breaking(tmp_path, {2}, max_steps=2, logging_steps=2, learning_rate=0.0)
    made.train()
    alone = breaking(tmp_path, set(), max_steps=2, logging_steps=2, learning_rate=0.0)
    alone.train()
    ours, theirs = made.state.log_history[0], alone.state.log_history[0]
    assert ours["loss_breaks"] == pytest.approx(theirs["loss_breaks"], rel=0.2) and ours["loss"] > 0
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.2)


def test_a_learning_rate_of_a_million_never_ends_well(tmp_path: Path) -> None:
    made = trainer(
        tmp_path, max_steps=6, learning_rate=1e30, save_strategy="steps", save_steps=1, eval_dataset=Images(4)
    )
    with pytest.raises(InputError, match=r"expected (a )?finite"):
        made.train()
        made.evaluate()
    for folder in tmp_path.glob("checkpoint-*"):
        assert all(value.isfinite().all() for value in load_file(folder / "model.safetensors").values())


def test_weights_that_are_not_finite_are_not_trained_saved_scored_or_pushed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = trainer(tmp_path / "run", eval_dataset=Images(4))
    made.save_model(str(tmp_path / "good"))
    name, parameter = next(iter(made.student.named_parameters()))
    with torch.no_grad():
        parameter.view(-1)[0] = float("nan")
    for what in (made.train, made.evaluate, lambda: made.save_model(str(tmp_path / "bad")), made.push_to_hub):
        with pytest.raises(InputError, match=rf"expected finite weights .*{name}"):
            what()
    assert not (tmp_path / "bad").exists()
    state = load_file(tmp_path / "good" / "model.safetensors")
    state[name].view(-1)[0] = float("inf")
    save_file(state, tmp_path / "good" / "model.safetensors", metadata={"format": "pt"})
    assert push.main([str(tmp_path / "good"), "me/it", "--dry-run"]) == 2
    assert f"NaN or infinity in {name}; nothing was pushed" in capsys.readouterr().err
    data = ["data.path=shapes", "data.generated={train: 2, validation: 2, test: 2, size: 64}"]
    six = student(num_labels=6)
    with torch.no_grad():
        next(six.parameters()).view(-1)[0] = float("nan")
    six.save_pretrained(tmp_path / "six")
    assert evaluate.main([str(tmp_path / "six"), *data]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "error" in line or "Traceback" in line]
    assert len(said) == 1 and "expected finite weights to score" in said[0]
    with pytest.raises(InputError, match="six: expected finite weights to export, got NaN or infinity in"):
        load_to_export(str(tmp_path / "six"))


def test_outputs_that_are_not_finite_are_not_scored(tmp_path: Path) -> None:
    made = trainer(tmp_path, eval_dataset=Bad(12, {9}))
    with pytest.raises(InputError, match="expected finite outputs to score, got NaN or infinity for 1 of 12 images"):
        made.evaluate()
    assert trainer(tmp_path, eval_dataset=Images(4)).evaluate()["eval_miou"] >= 0


@pytest.mark.parametrize("form", ["names", "row"])
def test_outputs_of_a_loss_of_the_user_are_looked_at(form: str, tmp_path: Path) -> None:
    guard = ScoreGuard(trainer(tmp_path, eval_dataset=Images(4)))
    guard.begin_scoring()
    masks = torch.zeros(3, 2, 4, 4)
    masks[1, 0, 0, 0] = float("nan")
    masks[2, 1] = -torch.inf  # certainly outside
    guard.see_answers({"pred_masks": masks} if form == "names" else (torch.zeros([]), masks))
    if form == "names":
        with pytest.raises(InputError, match="got NaN or infinity for 1 of 3 images"):
            guard.end_scoring()
    else:  # what the values are nobody knows
        guard.end_scoring()


@pytest.mark.parametrize("kind", ["ours", "segformer", "upernet", "dpt", "beit"])
def test_a_batch_without_a_label_counts_nothing(kind: str, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    class Void(Images):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            item = super().__getitem__(index)
            return {**item, "labels": torch.full_like(item["labels"], 255)}

    made = trainer(tmp_path, Void(8), model=native(kind), teacher=None, terms=None, max_grad_norm=0.0)
    before = {name: value for name, value in weights(made).items() if value.is_floating_point()}
    made.train()
    made.evaluate(Void(4))
    after = {name: value for name, value in weights(made).items() if name in before}
    changed = [name for name in before if not torch.equal(before[name], after[name]) and "running_" not in name]
    assert not changed and not log.text
    assert made.state.log_history[0]["loss"] == made.state.log_history[0]["loss_task"] == 0


def native(kind: str) -> Any:
    """A tiny student of transformers, or ours."""
    from transformers import BeitConfig, DPTConfig, ResNetConfig, UperNetConfig

    if kind == "ours":
        return student()
    torch.manual_seed(0)
    vit = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
    sizes = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
    resnet = ResNetConfig(embedding_size=8, layer_type="basic", out_indices=[1, 2, 3, 4], **sizes)
    config = {
        "segformer": lambda: SegformerConfig(**sizes, num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16),
        "upernet": lambda: UperNetConfig(backbone_config=resnet, hidden_size=8, auxiliary_channels=8),
        "dpt": lambda: DPTConfig(
            **vit,
            image_size=64,
            patch_size=16,
            backbone_out_indices=[0, 1, 2, 3],
            fusion_hidden_size=8,
            neck_hidden_sizes=[8, 8, 8, 8],
        ),
        "beit": lambda: BeitConfig(**vit, image_size=64, patch_size=16, out_indices=[0, 1, 2, 3]),
    }[kind]()
    config.num_labels = CLASSES
    return AutoModelForSemanticSegmentation.from_config(config)


@pytest.mark.slow
def test_two_processes_skip_and_refuse_together(tmp_path: Path) -> None:
    run_two(Path(__file__).with_name("two_processes_finite.py"), tmp_path)
    first, second = ((tmp_path / f"said{rank}.txt").read_text().splitlines() for rank in (0, 1))
    assert first[0] == second[0] == "skipped 1"
    states = [load_file(tmp_path / f"skipped{rank}.safetensors") for rank in (0, 1)]
    assert largest_difference(*states) == 0
    assert first[1] == second[1] and "for image 13 of the training set" in first[1]
    assert first[2] == second[2] and "for some images" in first[2]
    assert first[3] == second[3] and len(first[3]) == 64
    assert "another process" in first[4] and "backbone" in second[4]
    assert first[5] == second[5] and "teacher: expected the same weights on every process" in first[5]
