"""No step waits for an accelerator, but in what is named as exempt."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cankd_hf.training.arguments import CanKDConfig
from cankd_hf.training.monitoring import interval
from cankd_hf.training.monitoring.interval import BatchClock
from tests.models.detectors import detector, pictures
from tests.waits import DEVICE, Waits, move, pretending

from .step_waits import KINDS, counted, exempt
from .tiny_trainers import Images, trainer

OFTEN = ("segmentation/resnet_fpn", "features/dinov2", "detection/retinanet_resnet")
EACH = [pytest.param(kind, marks=[] if kind in OFTEN else [pytest.mark.slow]) for kind in KINDS]


@pytest.mark.parametrize("kind", EACH)
def test_steps_wait_for_nothing_that_is_not_exempt(kind: str, tmp_path: Path) -> None:
    for name, waits in counted(kind, tmp_path).items():
        assert not waits.without(exempt(kind)), f"{kind}: {name}"
    assert waits.opened > 1


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_steps_wait_for_nothing_on_a_gpu(kind: str, tmp_path: Path) -> None:
    test_steps_wait_for_nothing_that_is_not_exempt(kind, tmp_path)


# The settings that change what a step does, each beside the defaults of `counted`.
SETTINGS: dict[str, dict[str, Any]] = {
    "a plain optimizer": {"optim": "sgd", "max_grad_norm": 0.0},
    "an optimizer that undoes": {"optim": "adamw_torch", "gradient_accumulation_steps": 1},
    "no filter": {"logging_nan_inf_filter": False, "lr_scheduler_type": "cosine", "warmup_steps": 2},
    "channels last": {"channels_last": True, "average_tokens_across_devices": True},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * ("optimizer" in name)) for name in SETTINGS]
)
def test_settings_add_no_waits(name: str, tmp_path: Path) -> None:
    found = counted("segmentation/resnet_fpn", tmp_path, **SETTINGS[name])
    assert not found["training"].found and not found["evaluation"].found


# The counter itself


def reads(found: Tensor) -> None:
    found.sum().item()


WAITING = {
    "item": reads,
    "bool": lambda x: bool((x > 0).all()),
    "tolist": lambda x: x.tolist(),
    "mask": lambda x: x[x > 0],
    "masked assignment": lambda x: x.index_put_((x > 0,), x[0].expand(1).repeat(3)),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x + 1),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "copy_": lambda x: torch.zeros(3).copy_(x),
    "index of a list": lambda x: x[[0, 1]],
    "index of the host": lambda x: x[torch.tensor([0, 1])],
    "index of a number": lambda x: x[(x.argmax())],
    "tensor": lambda x: torch.tensor([1.0], device=x.device),
    "as_tensor": lambda x: torch.as_tensor([1.0], device=x.device),
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "to the device": lambda x: torch.ones(3).to(x.device),
    "bincount": lambda x: x.long().bincount(),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
}
QUIET = {
    "arithmetic": lambda x: (x + 1).softmax(0).topk(2),
    "new values": lambda x: torch.arange(3, device=x.device) + x.new_full((3,), 2),
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.0),
    "masked assignment of one number": lambda x: x.clone().__setitem__(x > 0, 0.0),
    "gather": lambda x: x.gather(0, x.argmax()[None]),
    "copies aside": lambda x: (x.to("cpu", non_blocking=True), torch.ones(3).to(x.device, non_blocking=True)),
    "a number of the host": lambda x: x * torch.tensor(2.0),
    "repeat_interleave of a known size": lambda x: x.repeat_interleave(x.long(), output_size=6),
}


@pytest.mark.parametrize("operation", [*WAITING, *QUIET])
def test_waits_are_counted(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = Waits()
    with pretending(waits, monkeypatch):
        values = torch.tensor([1.0, 2.0, 3.0]).to(DEVICE)
        waits.open = True
        {**WAITING, **QUIET}[operation](values)
    assert bool(waits.found) == (operation in WAITING), waits.found
    assert all("test_waits:" in where for _, where in waits.found)


def test_a_pretended_device_computes_what_the_cpu_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, pretended = (trainer(tmp_path / name, eval_dataset=Images(8)) for name in ("plain", "pretended"))
    plain.train()
    expected = plain.evaluate()
    vars(pretended.args)["_setup_devices"] = DEVICE
    pretended.guard.__init__(pretended)  # type: ignore[misc]
    with pretending(Waits(), monkeypatch):
        move(pretended.model)
        for teacher in pretended.teachers.values():
            move(teacher)
        pretended.train()
        found = pretended.evaluate()
    assert found["eval_miou"] == pytest.approx(expected["eval_miou"], abs=1e-3)
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-4)


def test_tensors_of_two_devices_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretending(Waits(), monkeypatch), pytest.raises(RuntimeError, match="one device"):
        torch.ones(3).to(DEVICE) + torch.ones(3)


@pytest.mark.parametrize(
    "fault", [{}, {"class_labels": torch.tensor([0, 7])}, {"boxes": torch.tensor([[0.5, 0.5, 0, 1]] * 2)}]
)
def test_wrong_labels_on_a_device_make_the_loss_nan(fault: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model, (images, labels) = detector("retinanet_resnet"), pictures(1)
    waits = Waits()
    with pretending(waits, monkeypatch), torch.no_grad():
        move(model)
        moved = {key: value.to(DEVICE) for key, value in {**labels[0], **fault}.items()}
        loss = model(images.to(DEVICE), labels=[moved]).loss
    assert loss.values.isfinite() == (not fault)


# Settings and clocks of a GPU


def test_batches_are_copied_aside_where_they_are_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def copies(**settings: Any) -> bool:
        return CanKDConfig(str(tmp_path), use_cpu=True, **settings).accelerator_config.non_blocking

    assert copies() and copies(accelerator_config={"split_batches": False})
    assert not copies(accelerator_config={"non_blocking": False}) and not copies(dataloader_pin_memory=False)


def test_waiting_on_cuda_is_the_time_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        made: list[Event] = []

        def __init__(self, enable_timing: bool) -> None:
            self.number, self.passed = len(Event.made), False
            Event.made.append(self)

        def record(self) -> None: ...

        def query(self) -> bool:
            return self.passed

        def synchronize(self) -> None:
            for event in Event.made:
                event.passed = True

        def elapsed_time(self, other: Event) -> float:
            return 250.0 * (other.number - self.number)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    now = iter(range(100))
    monkeypatch.setattr(interval.time, "perf_counter", lambda: float(next(now)))
    args = SimpleNamespace(device=torch.device("cuda"), world_size=1, process_index=0, dataloader_num_workers=0)
    clock = BatchClock(args)
    for _ in range(2):
        clock.ask()
        clock.got([{"pixel_values": torch.zeros(4, 3, 8, 8)}])
    logs = clock.drain(SimpleNamespace(device=torch.device("cpu"), reduce=lambda value, how: value))
    assert logs["data_wait"] == pytest.approx(0.5 / 2, abs=0.1) and clock.drain(None) == {}
