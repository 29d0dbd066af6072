"""Runs of a comparison in processes of their own: one by one, or side by side on several devices."""

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

from cankd_hf.compare.arms import Arm, TeacherRun
from cankd_hf.compare.origin import code_hash, code_now, machine
from cankd_hf.compare.planning import Planner, Run
from cankd_hf.compare.prices import MOST_ROUNDS
from cankd_hf.compare.records import CALIBRATION_FILE, Record, Records
from cankd_hf.config.recipe import Recipe, recipe_to_yaml
from cankd_hf.errors import InputError
from cankd_hf.runs.record import write_json

logger = logging.getLogger(__name__)
Say = Callable[[str], None]


class RunFailed(Exception):
    """A run ended with an error; the message is its last word."""


class Processes:
    """Starts runs in child processes, and ends those that are left when the comparison ends.

    Args:
        records: where records and folders of runs are.
        jobs: number of runs side by side; each has a share of the CPU cores, or a CUDA device.
        costs: whether what runs cost counts, so that none may share a device with another.

    Raises:
        InputError: for more runs than CUDA devices, where there are any and costs count.
    """

    def __init__(self, records: Records, jobs: int = 1, costs: bool = True) -> None:
        devices = len(visible_devices())
        if costs and 0 < devices < jobs:
            raise InputError(
                f"--jobs: expected at most {devices}, the number of devices here, got {jobs}; what runs that share a "
                "device cost is not known"
            )
        self.records, self.jobs = records, jobs
        self.sharing = 0 < devices < jobs  # runs share a device
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._ended = False

    def run(self, run: Run, place: int) -> Record:
        """Trains one run and returns its record.

        Raises:
            RunFailed: if it ended with an error.
            InputError: if the code changed meanwhile, so that nobody knows what ran.
        """
        runs = self.records.runs
        runs.mkdir(parents=True, exist_ok=True)
        folder, file, log = runs / run.key, runs / f"{run.key}.yaml", runs / f"{run.key}.log"
        file.write_text(recipe_to_yaml(replace(run.recipe, output_dir=str(folder))), encoding="utf-8")
        if (known := self.records.find(run.key)) is not None and known.beside and folder.is_dir():
            shutil.rmtree(folder)  # it is run for its cost, which what is there would only repeat
        code = self._start("train", file, log, place)
        if (now := code_now()) != code_hash() and not self.records.any_code:
            raise InputError(
                f"the code changed while {run.name} ran, which is not counted; the same command starts again with the "
                "code as it is now"
            )
        if code != 0:
            raise RunFailed(f"{last_word(log)} (exit code {code}; {log})")
        try:
            record = self.records.record_of(folder, run.key, run.name, run.recipe)
            record = replace(record, code=now, beside=self.sharing)
        except (InputError, LookupError) as error:
            raise RunFailed(f"its results cannot be read: {error} ({folder})") from error
        for checkpoint in [*folder.glob("checkpoint-*"), *folder.glob("phase-*/checkpoint-*")]:
            shutil.rmtree(checkpoint)
        return record

    def calibrate(
        self, arms: Mapping[str, Arm], precision: float | None = None, say: Say = logger.info
    ) -> dict[str, Any]:
        """Measures what a step of each arm costs, in one process; with a precision until each is known to it.

        Raises:
            InputError: if that fails.
        """
        teachers = {teacher.key: teacher for arm in arms.values() for teacher in arm.teachers}
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)

            def written(recipe: Recipe, name: str) -> str:
                file = folder / f"{name}.yaml"
                file.write_text(recipe_to_yaml(replace(recipe, output_dir=str(folder / name))), encoding="utf-8")
                return str(file)

            spec = {
                "arms": {name: written(arm.recipe, f"arm{index}") for index, (name, arm) in enumerate(arms.items())},
                "teachers": {
                    str(self.records.runs / key): written(teacher.recipe, f"teacher-{key}")
                    for key, teacher in teachers.items()
                },
                "output": str(folder / "costs.json"),
                "precision": precision,
                "by_clock": self.records.by_clock,
            }
            file, log = folder / "spec.json", folder / "calibration.log"
            if not self.records.fixed:
                self.records.runs.mkdir(parents=True, exist_ok=True)
                log = self.records.runs / log.name
            write_json(file, spec)
            if precision is not None:
                say(f"until each is known to {precision:.0%}, or {MOST_ROUNDS} times; each turn is told in {log}")
            code = self._start("calibrate", file, log, 0)
            if code != 0:
                kept = "" if self.records.fixed else f"; {log}"
                raise InputError(f"calibration: {last_word(log)} (exit code {code}{kept})")
            return dict(json.loads((folder / "costs.json").read_text(encoding="utf-8")))

    def _start(self, kind: str, file: Path, log: Path, place: int) -> int:
        command = [sys.executable, "-m", "cankd_hf.compare.child", kind, str(file), str(os.getpid())]
        with log.open("wb") as stream:
            with self._lock:
                if self._ended:
                    raise RunFailed("the comparison was stopped")
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env=self.environment(place),
                    start_new_session=True,  # Ctrl-C is for the comparison, which tells its runs once
                )
                self._running.add(process)
            try:
                return process.wait()
            finally:
                self._running.discard(process)

    def environment(self, place: int) -> dict[str, str]:
        """The environment of the run at a place: its device, or its share of the CPU cores."""
        env = dict(os.environ)
        devices = visible_devices()
        if devices:
            env["CUDA_VISIBLE_DEVICES"] = devices[place % len(devices)]
        if self.jobs > max(1, len(devices)) and "OMP_NUM_THREADS" not in env:
            env["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.jobs))
        return env

    def end(self) -> None:
        """Asks the runs that are left to save a checkpoint and stop, and waits for them."""
        with self._lock:
            self._ended = True
            left = list(self._running)
        for process in left:
            process.terminate()
        for process in left:
            process.wait()


def visible_devices() -> list[str]:
    """CUDA devices as `CUDA_VISIBLE_DEVICES` names them; empty without one."""
    import torch

    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]


def last_word(log: Path) -> str:
    """The last error that a command wrote, else its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or ["it said nothing"])[-1].removeprefix("error: ")


Start = Callable[[Run, int], Record]


def complete(planner: Planner, start: Start, jobs: int, say: Say, stop: Callable[[], None] = lambda: None) -> None:
    """Runs all that is still to be run; each record is written when its run ends. Failures are named and left out.

    Args:
        planner: works out what can start.
        start: trains a run at one of `jobs` places.
        jobs: number of runs side by side.
        say: told of each run's beginning and end.
        stop: ends the runs that are left where an exception ends this one.
    """
    with ThreadPoolExecutor(jobs) as pool:
        running: dict[Future[Record], tuple[Run, int]] = {}
        try:
            while True:
                busy, used = {run.key for run, _ in running.values()}, {place for _, place in running.values()}
                free = [place for place in range(jobs) if place not in used]
                todo = [run for run in planner.sweep() if run.key not in busy]
                for run, place in zip(todo, free, strict=False):
                    steps = run.recipe.training.get("max_steps", -1)
                    say(f"{run.name}: {steps} steps -> {planner.records.runs / run.key}")
                    running[pool.submit(start, run, place)] = run, place
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    _ended(planner, running.pop(future)[0], future, say)
        except BaseException:
            stop()
            raise


def _ended(planner: Planner, run: Run, future: Future[Record], say: Say) -> None:
    try:
        record = future.result()
    except RunFailed as error:
        planner.failed[run.key] = str(error)
        say(f"{run.name}: failed: {error}")
        return
    record = planner.records.add(record)
    score = "no score" if record.score is None else f"{record.metric} {record.score:.4f}"
    say(f"{run.name}: {score}, {record.spent:.{0 if record.spent >= 100 else 1}f} {record.unit.replace('_', ' ')}")


def calibrated(planner: Planner, measure: Callable[[Mapping[str, Arm]], dict[str, Any]], say: Say) -> dict[str, Any]:
    """The costs of a step of every arm and teacher, measured unless those of the same arms are known."""
    arms = {name: arm for name, arm in planner.arms.items() if not arm.follows}
    teachers = {run.name: run for arm in arms.values() for run in arm.teachers}
    keys = {name: planner.records.recipe_key(arm.recipe) for name, arm in arms.items()}
    known, code, here = planner.calibration, code_hash(), machine()
    measured_there = known.get("keys") == keys and known.get("machine") == here and not known.get("failed")
    if not measured_there or (known.get("code") != code and not planner.records.any_code):
        say(f"measuring the cost of a step of {len(arms)} arms, in turn")
        measured = measure({**arms, **{_of(run): Arm(_of(run), run.recipe) for run in teachers.values()}})
        planner.calibration = {**measured, "keys": keys, "code": code, "machine": here}
        for name, wrong in planner.uncalibrated.items():
            say(f"{name}: failed: {wrong}")
        planner.records.save(CALIBRATION_FILE, planner.calibration)
    return planner.calibration


def _of(run: TeacherRun) -> str:
    return f"training of {run.name}"
