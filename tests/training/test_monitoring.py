"""Waiting for data, the bar, energy and the last line of a run."""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_callback import tqdm
from transformers.utils.notebook import NotebookProgressCallback

from cankd_hf.cli.report import end_line
from cankd_hf.runs.record import Arm, Report
from cankd_hf.training.monitoring import energy, interval
from cankd_hf.training.monitoring.energy import Counter, EnergyMeter, find_counter, gpu_counter, rapl_counter
from cankd_hf.training.monitoring.interval import BatchClock
from cankd_hf.training.monitoring.progress import TrainingProgress, show_progress

from .tiny_trainers import Images, trainer


class SlowImages(Images):
    """Images that take their time."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        time.sleep(0.02)
        return super().__getitem__(index)


class Stream(IterableDataset):
    """The same as a stream."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        images = Images(16)
        return iter([images[index] for index in range(16)])


def logged(made: Any, name: str) -> list[float]:
    return [entry[name] for entry in made.state.log_history if name in entry]


# Waiting for data


def test_waiting_is_measured_over_accumulated_batches(tmp_path: Path) -> None:
    settings = {"max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    made = trainer(tmp_path, data=SlowImages(16), **settings)
    made.train()
    waits, rates = logged(made, "data_wait"), logged(made, "images_per_second")
    assert len(waits) == len(rates) == 6 and all(0 <= share <= 1 for share in waits)
    assert sum(waits) / 6 > 0.15, "80 ms of each step are spent in the data set"
    assert 0 < min(rates) < 4 / 0.08


def test_a_fast_set_waits_little_also_as_a_stream(tmp_path: Path) -> None:
    made = trainer(tmp_path, data=Stream(), max_steps=3)
    made.train()
    assert len(logged(made, "data_wait")) == 3 and min(logged(made, "data_wait")[1:]) < 0.3


class Clock:
    """Replaces `time.perf_counter`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(interval.time, "perf_counter", lambda: self.now)


def passed(clock: Clock, meter: BatchClock, waiting: float, computing: float, other: Any = 0.0) -> dict[str, float]:
    """One interval of two steps, after which something else takes its time. The other process waits `other` more."""
    for _ in range(2):
        meter.ask()
        clock.now += waiting / 2
        meter.got([{"pixel_values": torch.zeros(4, 3, 8, 8)}])
        clock.now += computing / 2
    processes = SimpleNamespace(
        device=torch.device("cpu"), reduce=lambda value, how: 2 * value + torch.tensor([0.0, other, 0.0])
    )
    logs = meter.drain(processes)
    clock.now += 1000.0
    return logs


def arguments(**changes: Any) -> Any:
    settings = {"device": torch.device("cpu"), "world_size": 2, "process_index": 0, "dataloader_num_workers": 1}
    return SimpleNamespace(**{**settings, **changes})


def test_shares_and_rates_are_of_all_processes_and_without_evaluations(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock, meter = Clock(monkeypatch), BatchClock(arguments())
    assert meter.drain(None) == {}, "nothing was trained"
    # 16 images by two processes in 4 s, of which one waits 1 s and the other 3 s.
    assert passed(clock, meter, 1.0, 3.0, other=2.0) == {"images_per_second": 4.0, "data_wait": 0.5}
    for _ in range(2):
        passed(clock, meter, 2.0, 2.0)
    passed(clock, meter, 1.0, 3.0)  # not in a row
    for _ in range(2):
        passed(clock, meter, 2.0, 2.0)
    assert not caplog.records
    for _ in range(5):
        passed(clock, meter, 2.0, 2.0)
    [warning] = [record.getMessage() for record in caplog.records]
    assert "waits 50% of the time" in warning


def test_no_share_where_waiting_cannot_be_told_from_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = BatchClock(arguments(device=torch.device("mps")))
    assert passed(Clock(monkeypatch), meter, 1.0, 3.0) == {"images_per_second": 4.0}


# The bar


def test_only_the_plain_bar_is_replaced(tmp_path: Path) -> None:
    others: list[TrainerCallback] = [PrinterCallback(), NotebookProgressCallback()]
    callbacks = [*others, ProgressCallback()]
    show_progress(callbacks, "miou")
    assert callbacks[:2] == others and type(callbacks[2]) is TrainingProgress
    for disabled, kind in ((True, PrinterCallback), (False, TrainingProgress)):
        shown = [
            c for c in trainer(tmp_path, disable_tqdm=disabled).callback_handler.callbacks if "Pr" in type(c).__name__
        ]
        assert [type(callback) for callback in shown] == [kind]


def test_a_run_shows_its_losses_and_no_dictionaries(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = trainer(
        tmp_path, disable_tqdm=False, eval_dataset=Images(4), eval_strategy="steps", eval_steps=1, data=SlowImages(16)
    )
    made.train()
    out, err = capfd.readouterr()
    assert "{" not in out + err
    assert err.count("(eval)") == 2 and "step 1: miou 0." in err and "\r" not in err
    [last] = [line for line in err.splitlines() if line.startswith("step 2 of 2 (100%)")]
    assert ", 00:00 left, loss " in last and "task " in last and "cankd " in last and "raw_r " in last


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> Iterator[Callable[[], str]]:
    """A terminal of this width as stderr; gives a function that reads what was written to it."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(theirs, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)

        def read() -> str:
            stream.write("\nthe end\n")
            stream.flush()
            said = b""
            while b"the end" not in said:  # it comes in pieces
                said += os.read(ours, 10**6)
            return said.decode().replace("the end", "")

        yield read
    os.close(ours)


def test_the_bar_fits_the_terminal_and_tells_what_is_left_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    logs = {"loss": 1.0, "loss_task": 2.5, **{f"loss_term_{n}": 0.123 for n in range(9)}, "data_wait": 0.4}
    for columns, shown in ((80, 2), (200, 9)):
        with terminal(monkeypatch, columns) as read:
            bar = TrainingProgress("ap")
            bar.whole = lambda: 7384.0
            state = SimpleNamespace(is_world_process_zero=True, max_steps=80000, global_step=0)
            bar.on_train_begin(None, state, None)
            state.global_step = 1234
            bar.on_step_end(None, state, None)
            bar.on_log(None, state, None, logs=logs)
            bar.on_log(None, state, None, logs={"eval_ap": 0.25})
            bar.on_train_end(None, state, None)
            lines = [line for line in re.split("[\r\n]+", re.sub("\x1b[^A-Z]*[A-Z]", "", read())) if line.strip()]
        assert "step 1234: ap 0.2500 (eval)" in lines
        assert all(len(line) <= columns for line in lines), lines
        told = next(line for line in lines if "loss 1" in line)
        assert "1234/80000" in told and "whole run 2:03:04, loss 1" in told and told.endswith("]")
        assert told.count("term_") >= shown - 2 and "██" not in told[:3]


def test_waiting_is_shown_where_it_is_worth_knowing_and_resumed_steps_cost_no_time() -> None:
    bar = TrainingProgress("ap")
    state = SimpleNamespace(is_world_process_zero=True, max_steps=100, global_step=40)
    bar.on_train_begin(None, state, None)
    bar.training_bar.close()
    bar.training_bar, bar._on_terminal = tqdm(total=100, initial=40, file=io.StringIO()), True
    assert bar.current_step == 40
    bar.on_log(None, state, None, logs={"loss": 1.0, "loss_ap/s0t0": 2.0, "data_wait": 0.05})
    assert bar.training_bar.postfix == "loss 1"
    bar.on_log(None, state, None, logs={"loss": 1.0, "data_wait": 0.456})
    assert bar.training_bar.postfix == "loss 1, data_wait 46%"
    bar.training_bar.close()


# Energy


def powercap(root: Path, **joules: float) -> Path:
    """Zones as Linux shows them: packages, a part of one, the platform and the same package by another way."""
    for zone, name in (
        ("intel-rapl:0", "package-0"),
        ("intel-rapl:1", "package-1"),
        ("intel-rapl:0:0", "core"),
        ("intel-rapl:2", "psys"),
        ("intel-rapl-mmio:0", "package-0"),
    ):
        (root / zone).mkdir(parents=True, exist_ok=True)
        (root / zone / "name").write_text(name + "\n")
        (root / zone / "max_energy_range_uj").write_text("1000000000\n")
        (root / zone / "energy_uj").write_text(f"{int(1e6 * joules.get(name.replace('-', ''), 7))}\n")
    return root


def test_rapl_counts_each_package_once(tmp_path: Path) -> None:
    assert rapl_counter(tmp_path / "nowhere") is None
    counter = rapl_counter(powercap(tmp_path, package0=12.5, package1=3))
    assert counter is not None and counter.label == "CPU packages (RAPL)"
    assert counter.read() == [12.5, 3.0] and counter.spans == [1000.0, 1000.0]
    file = tmp_path / "intel-rapl:1" / "energy_uj"
    file.unlink()
    file.mkdir()  # cannot be read, also by root
    assert rapl_counter(tmp_path) is None


def test_gpu_counters_are_found_by_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_counter(["GPU-a"]) is None, "not installed"
    nvml: Any = ModuleType("pynvml")
    nvml.NVMLError = type("NVMLError", (Exception,), {})
    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetHandleByUUID = {"GPU-a": "first", "GPU-b": "second", "GPU-old": "old"}.__getitem__

    def consumed(handle: str) -> int:
        if handle == "old":
            raise nvml.NVMLError("Not Supported")
        return {"first": 2500, "second": 1000}[handle]

    nvml.nvmlDeviceGetTotalEnergyConsumption = consumed
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    both = gpu_counter(["GPU-a", "GPU-b"])
    assert both is not None and both.read() == [2.5, 1.0] and both.label == "GPU energy counter of 2 devices"
    assert gpu_counter(["GPU-old"]) is None


def test_the_counter_is_of_what_the_run_computes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "rapl_counter", lambda: "cpu")
    monkeypatch.setattr(energy, "gpu_counter", list)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"id{index}"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert find_counter(arguments()) == "cpu"
    assert find_counter(arguments(world_size=4)) is None, "another machine has a part in it"
    assert find_counter(arguments(device=torch.device("cuda", 0))) == ["GPU-id0", "GPU-id1"]
    assert find_counter(arguments(device=torch.device("mps"))) is None
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert find_counter(arguments(world_size=1, device=torch.device("cuda", 1))) == ["GPU-id1"]


class Fake:
    """A counter of two packages: 3 J and 2 J more at each look; the first starts again at 10 J."""

    def __init__(self) -> None:
        self.states = [[8.0, 0.0]]

    def read(self) -> list[float]:
        first, second = self.states[-1]
        self.states.append([(first + 3.0) % 10.0, second + 2.0])
        return [first, second]

    def counter(self, args: Any = None) -> Counter:
        return Counter("CPU packages (RAPL)", self.read, [10.0, 1000.0])


def energies(folder: Path, find: Any, resume: str | None = None, **settings: Any) -> Any:
    made = trainer(folder, save_strategy="steps", save_steps=2, **settings)
    made.remove_callback(EnergyMeter)
    made.energy = EnergyMeter(find)
    made.add_callback(made.energy)
    made.train(resume_from_checkpoint=resume)
    made.save_model(str(folder))
    return made


def test_energy_adds_up_over_wrapped_counters_and_resumed_runs(tmp_path: Path) -> None:
    fake = Fake()
    first = energies(tmp_path, fake.counter)
    # One look at the start, one at each log line.
    assert logged(first, "train_joules") == [5.0, 10.0, 15.0]
    facts = json.loads((tmp_path / "distillation.json").read_text())
    assert facts["energy"] == {"joules": 15.0, "measured": "CPU packages (RAPL)"}
    checkpoint = str(tmp_path / "checkpoint-2")
    saved = json.loads((tmp_path / "checkpoint-2" / "distillation.json").read_text())
    assert saved["energy"]["joules"] == 10.0
    resumed = energies(tmp_path / "b", fake.counter, checkpoint, max_steps=3)
    assert logged(resumed, "train_joules") == [5.0, 10.0, 15.0, 20.0]
    # Where a part of the run was not measured, nothing is said: neither after it nor by a later part.
    blind = energies(tmp_path / "c", lambda args: None, checkpoint, max_steps=4)
    assert "energy" not in json.loads((tmp_path / "c" / "distillation.json").read_text())
    again = energies(tmp_path / "d", fake.counter, str(tmp_path / "c" / "checkpoint-4"), max_steps=5)
    assert logged(blind, "train_joules") == logged(again, "train_joules") == [5.0, 10.0]
    assert "energy" not in json.loads((tmp_path / "d" / "distillation.json").read_text())


def test_a_counter_that_fails_ends_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    states = [[1.0], [2.0]]

    def read() -> list[float]:
        if not states:
            raise OSError("gone")
        return states.pop(0)

    made = energies(tmp_path, lambda args: Counter("one", read, [10.0]))
    assert made.state.global_step == 2 and made.energy.facts(made.state) is None
    assert "can no longer be read (gone)" in caplog.text


# The last line


@pytest.mark.parametrize(
    ("metric", "split", "scores", "seconds", "line"),
    [
        ("miou", "test", {"miou": 0.31}, 112.4, "Reached mIoU 0.310 (test) after 800 steps in 112 s; student: "),
        ("ap", "validation", {"ap": 0.5}, 11100, "Reached AP 0.500 (validation) after 800 steps in 3.1 h; "),
        ("ap", "test", {"ap": float("nan")}, 59.7, "Trained 800 steps in 60 s; student: "),
        ("cka", "validation", {}, 0.4, "Trained 800 steps in 0.40 s; student: "),
    ],
)
def test_the_last_line(
    tmp_path: Path, metric: str, split: str, scores: dict[str, float], seconds: float, line: str
) -> None:
    for name in ("results.json", "recipe.yaml"):
        (tmp_path / name).touch()
    report = Report("x", metric, split, [Arm("student", str(tmp_path), scores, 1, 800, seconds)], str(tmp_path))
    said = end_line(report)
    assert said.startswith(line) and said.endswith(f"student: {tmp_path}; results and recipe beside it.")
