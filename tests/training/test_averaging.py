"""The average of the student's weights: its formula, its files, its resume, and the choice at the end."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import HfArgumentParser, TrainerCallback

from cankd_hf.errors import InputError
from cankd_hf.hub.upload import plan
from cankd_hf.models.fpn.modeling_cankd_fpn import FPNForSemanticSegmentation
from cankd_hf.training.arguments import CanKDConfig
from cankd_hf.training.averaging import Average, decay_of
from cankd_hf.training.trainer import CanKDTrainer

from .test_finite import breaking
from .tiny_trainers import Images, largest_difference, student, trainer

State = dict[str, torch.Tensor]
FAST = {"teacher": None, "terms": None, "max_steps": 4, "learning_rate": 0.3, "per_device_train_batch_size": 4}


class States(TrainerCallback):
    """The student's state after each step."""

    def __init__(self) -> None:
        self.seen: list[State] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.seen.append(copied(model))


def copied(module: nn.Module) -> State:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def mean(states: list[State], decay: float) -> State:
    """The weighted mean of states from its definition."""
    weights = torch.tensor([decay ** (len(states) - 1 - i) for i in range(len(states))], dtype=torch.float64)
    weights /= weights.sum()
    return {
        name: torch.stack([w * s[name].double() for w, s in zip(weights, states, strict=True)]).sum(0)
        for name in floats(states[0])
    }


def floats(state: State) -> State:
    return {name: value for name, value in state.items() if value.is_floating_point()}


def load(folder: Path) -> State:
    return dict(FPNForSemanticSegmentation.from_pretrained(folder).state_dict())


def test_the_average_is_the_weighted_mean_of_the_steps_with_statistics_and_counters(tmp_path: Path) -> None:
    seen = States()
    made = trainer(
        tmp_path, model=student(norm="batch"), ema=0.8, gradient_accumulation_steps=2, callbacks=[seen], **FAST
    )
    made.train()
    assert made.average is not None and len(seen.seen) == 4
    expected, found = mean(seen.seen, 0.8), made.average.state
    assert largest_difference(expected, floats(found)) < 1e-6
    assert largest_difference(floats(found), floats(seen.seen[-1])) > 1e-3, "it would prove nothing"
    assert any("running_var" in name for name in found)
    for name, value in found.items():
        if not value.is_floating_point():
            assert torch.equal(value, seen.seen[-1][name]), name


def test_a_skipped_step_changes_no_average(tmp_path: Path) -> None:
    for late in (False, True):
        seen = States()
        made = breaking(tmp_path, {2, 4}, max_steps=4, model=student(norm="batch"), ema=0.8, callbacks=[seen])
        made.guard.late = late
        made.train()
        assert made.average is not None and float(made.average.updates) == 2
        expected = mean([seen.seen[0], seen.seen[2]], 0.8)
        assert largest_difference(expected, floats(made.average.state)) < 1e-6


def test_a_short_run_with_a_long_average_is_not_its_start_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert decay_of("auto", 2000) == pytest.approx(0.975) and decay_of("auto", 200) == 0.95
    assert decay_of("auto", 10**7) == 0.9999 and decay_of(0.5, 200) == 0.5
    module = nn.Linear(2, 2).to(torch.bfloat16)
    nn.init.constant_(module.weight, 100.0)
    average = Average(module, 0.9999)
    for step in range(200):
        nn.init.constant_(module.weight, 1.0 + (step % 2) / 128)  # bfloat16 would lose the change of the mean
        average.update(torch.tensor(False))
    assert average.state["weight"].dtype == torch.float32
    assert average.state["weight"].mean().item() == pytest.approx(1 + 0.5 / 128, abs=1e-4)
    caplog.set_level(logging.WARNING)
    made = trainer(tmp_path, **FAST)
    made.args.ema = 0.9999
    made.begin_average(200)
    assert "averages over about 10000 of the 200 steps, more than a tenth" in caplog.text
    caplog.clear()
    made.args.ema = "auto"
    made.begin_average(200)
    assert not caplog.text


def test_it_is_saved_as_a_student_and_resumed_bit_for_bit(tmp_path: Path) -> None:
    settings: dict[str, Any] = {**FAST, "ema": "auto", "optim": "adamw_torch", "learning_rate": 1e-2}
    whole = trainer(tmp_path / "whole", Images(16, noisy=True), save_strategy="steps", save_steps=2, **settings)
    whole.train()
    whole.save_model(str(tmp_path / "whole"))
    middle, end = tmp_path / "whole" / "checkpoint-2", tmp_path / "whole"
    resumed = trainer(tmp_path / "resumed", Images(16, noisy=True), model=student(seed=5), **settings)
    resumed.train(resume_from_checkpoint=str(middle))
    assert whole.average is not None and resumed.average is not None
    assert largest_difference(whole.average.state, resumed.average.state) == 0
    assert largest_difference(load(end / "ema"), whole.average.state) == 0
    last = load(end)
    assert largest_difference(last, dict(whole.student.state_dict())) == 0, "no split: the last weights stay"
    assert largest_difference(last, whole.average.state) > 1e-4
    assert largest_difference(load(middle / "ema"), whole.average.state) > 1e-4
    assert json.loads((end / "distillation.json").read_text())["ema"]["chosen"] == "raw"
    files = {upload.name for upload in plan(end, "me/it")}
    assert {"model.safetensors", "ema/model.safetensors", "ema/config.json"} <= files
    assert not {name for name in files if name.startswith("ema.")}, "what is for resuming stays here"
    off = trainer(tmp_path / "off", **{**settings, "ema": None})
    with pytest.raises(InputError, match=r"saved with training\.ema; resume it the same way"):
        off.train(resume_from_checkpoint=str(middle))


@pytest.mark.parametrize("better", ["ema", "raw"])
def test_the_better_one_on_validation_becomes_the_student(
    better: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(tmp_path, ema=0.9, eval_dataset=Images(4), **FAST)
    scores = iter([{"miou": 0.4, "loss": 1.0}, {"miou": 0.5 if better == "ema" else 0.4, "loss": 2.0}])
    seen = []

    def scored(self: CanKDTrainer, dataset: Any) -> dict[str, float]:
        seen.append(copied(made.student))
        return next(scores)

    monkeypatch.setattr(CanKDTrainer, "_validated", scored)
    made.train()
    made.save_model(str(tmp_path))
    facts = json.loads((tmp_path / "distillation.json").read_text())
    assert facts["ema"]["chosen"] == better and facts["ema"]["scores"]["raw"]["miou"] == 0.4
    assert made.average is not None and largest_difference(seen[1], made.average.state) == 0
    assert largest_difference(load(tmp_path), seen[1 if better == "ema" else 0]) == 0
    assert (tmp_path / "raw").is_dir() == (better == "ema")
    if better == "ema":
        assert largest_difference(load(tmp_path / "raw"), seen[0]) == 0
        assert facts["scores"]["miou"] == 0.5
        assert json.loads((tmp_path / "raw" / "distillation.json").read_text())["scores"]["miou"] == 0.4
        made.eval_dataset = None
        made.train()  # another training has another average, and none of the weights of before
        assert made.student is not None and made.students().keys() == {"ema"}


def test_beside_it_is_the_best_checkpoint_where_that_is_asked_for(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "miou", "greater_is_better": True}
    made = trainer(tmp_path, ema=0.5, eval_dataset=Images(6), **settings, **FAST)
    made.train()
    choice = made.ema_facts()
    assert choice["metric"] == "miou" and choice["scores"]["raw"]["miou"] == pytest.approx(made.state.best_metric)
    assert made.evaluate()["eval_miou"] == pytest.approx(choice["scores"][choice["chosen"]]["miou"])
    assert choice["scores"][choice["chosen"]]["miou"] == max(one["miou"] for one in choice["scores"].values())


def test_a_student_whose_head_nothing_trains_is_not_chosen_by_its_score(tmp_path: Path) -> None:
    made = trainer(tmp_path, ema=0.5, eval_dataset=Images(4), task_weight=0.0, max_steps=1)
    made.train()
    assert made.ema_facts() == {
        "decay": 0.5,
        "chosen": "raw",
        "on": "",
        "why": "nothing trains what a score would be of",
    }


def test_what_cannot_be_averaged_is_refused(tmp_path: Path) -> None:
    for wrong in (0.0, 1.0, True, "fast", 2):
        with pytest.raises(InputError, match=r"training\.ema: expected auto, a decay between 0 and 1"):
            CanKDConfig(str(tmp_path), use_cpu=True, ema=wrong)
    read = HfArgumentParser([CanKDConfig]).parse_args_into_dataclasses
    for given, value in (("auto", "auto"), ("0.9", 0.9), ("off", None)):
        assert read(["--output_dir", str(tmp_path), "--use_cpu", "true", "--ema", given])[0].ema == value
    made = trainer(tmp_path, ema=0.9, **FAST)
    made.is_fsdp_enabled = True
    with pytest.raises(InputError, match=r"training\.ema: .*use DDP"):
        made.average_weights()
