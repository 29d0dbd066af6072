"""Energy of a training where the machine has a counter for it: read, never estimated."""

import importlib
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

POWERCAP = Path("/sys/class/powercap")
ENTRY = "train_joules"
# Seconds between two looks: RAPL counters of 32 bits start again after a quarter of an hour at 300 W.
LOOK_EVERY = 30.0


@dataclass
class Counter:
    """Counters that only grow."""

    label: str  # what is counted, in words
    read: Callable[[], list[float]]  # the state of each in joules; OSError where it can no longer be read
    spans: list[float]  # joules after which each starts again at 0; infinite where it never does


def find_counter(args: TrainingArguments) -> Counter | None:
    """The counter of what this run computes on; None where there is none, or it would not see the whole run."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size))
    if args.world_size > local:  # the other machines' counters are not to be read from here
        return None
    if args.device.type == "cpu":
        return rapl_counter()
    if args.device.type != "cuda" or torch.cuda.device_count() < local:
        return None
    devices = [args.device.index or 0] if local == 1 else range(local)
    uuids = [str(torch.cuda.get_device_properties(index).uuid).removeprefix("GPU-") for index in devices]
    return gpu_counter([f"GPU-{uuid}" for uuid in uuids])


def gpu_counter(uuids: Sequence[str]) -> Counter | None:
    """NVIDIA's energy counters (Volta and newer), where `pynvml` (package nvidia-ml-py) is installed.

    Devices are named by their UUID, `GPU-...`: numbers mean other devices to NVML than to CUDA.
    """
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None

    def read() -> list[float]:
        try:
            return [nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3 for handle in handles]
        except nvml.NVMLError as error:
            raise OSError(str(error)) from error

    try:
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
        read()
    except (nvml.NVMLError, OSError):
        return None
    devices = "1 device" if len(uuids) == 1 else f"{len(uuids)} devices"
    return Counter(f"GPU energy counter of {devices}", read, [math.inf] * len(uuids))


def rapl_counter(root: Path = POWERCAP) -> Counter | None:
    """The CPU packages' counters (Intel and AMD), where Linux lets us read them: most often only root may."""

    def number(file: Path) -> float:
        return int(file.read_text()) / 1e6

    try:
        # Zones of the packages alone: cores are in them, `psys` holds them, and the same ones come again as mmio.
        zones = [
            zone for zone in sorted(root.glob("intel-rapl:*")) if (zone / "name").read_text().startswith("package")
        ]
        spans = [number(zone / "max_energy_range_uj") for zone in zones]
        files = [zone / "energy_uj" for zone in zones]
        for file in files:
            number(file)
    except (OSError, ValueError):
        return None
    return Counter("CPU packages (RAPL)", lambda: [number(file) for file in files], spans) if files else None


class EnergyMeter(TrainerCallback):
    """Puts the joules since the start of the training into each entry of the log history, `train_joules`.

    A resumed run continues from the last entry; if that has none, nothing is logged.

    Args:
        find: finds the counter at the start of a training.
    """

    def __init__(self, find: Callable[[TrainingArguments], Counter | None] = find_counter) -> None:
        self._find = find
        self._counter: Counter | None = None
        self._label: str | None = None
        self._last: list[float] = []
        self._looked = 0.0
        self._joules = 0.0

    def facts(self, state: TrainerState) -> dict[str, Any] | None:
        """`joules` up to the last log line and what was `measured`; None where not all of it was."""
        logged = [entry[ENTRY] for entry in state.log_history if ENTRY in entry]
        return {"joules": logged[-1], "measured": self._label} if logged and self._label is not None else None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._counter = self._label = None
        before = state.log_history[-1].get(ENTRY) if state.log_history else None
        if state.global_step == 0:
            before = 0.0
        counter = self._find(args) if state.is_world_process_zero and before is not None else None
        if counter is None or before is None:
            return
        self._counter, self._label, self._joules = counter, counter.label, before
        self._last, self._looked = counter.read(), time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._counter is not None and time.perf_counter() - self._looked > LOOK_EVERY:
            self._look()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.on_step_end(args, state, control)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._look()
        if self._counter is not None:
            state.log_history[-1][ENTRY] = round(self._joules, 3)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._counter = None

    def _look(self) -> None:
        if self._counter is None:
            return
        try:
            now = self._counter.read()
        except (OSError, ValueError) as error:
            logger.warning("energy: the counter can no longer be read (%s); it is left out", error)
            self._counter = self._label = None
            return
        for last, new, span in zip(self._last, now, self._counter.spans, strict=True):
            self._joules += new - last + (span if new < last else 0.0)
        self._last, self._looked = now, time.perf_counter()
