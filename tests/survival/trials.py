"""Runs a recipe in forks of one process that has imported everything, kills them at chosen moments, and goes on.

`python -m tests.survival.trials FOLDER KIND COUNT` prints one JSON line per trial. A trial is one output folder: a
first call that is ended somehow, then calls of the same command until it ends, whose results are compared with those
of an uninterrupted run.
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from cankd_hf.cli import train

RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
RESNET["layer_type"] = "basic"
STUDENTS = ("teacher", "alone", ".")  # folders of the arms
OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.utime", "shutil.rmtree"}


def recipe(folder: Path) -> str:
    """A recipe of three arms and ten steps, with checkpoints, a best one, and the oldest deleted."""
    data = {"path": "shapes", "generated": {"train": 12, "validation": 4, "test": 4, "size": 64}}
    network = {"model_type": "cankd_fpn", "backbone_config": RESNET, "fpn_channels": 16, "head_channels": 16}
    every = {"eval_strategy": "steps", "eval_steps": 3, "save_steps": 3, "save_total_limit": 2}
    training = {
        **{"max_steps": 10, "per_device_train_batch_size": 4, "logging_steps": 1, "use_cpu": True, **every},
        **{"load_best_model_at_end": True, "metric_for_best_model": "miou", "disable_tqdm": True},
    }
    settings = {
        **{"task": "segmentation", "output_dir": str(folder / "run"), "baseline": True, "training": training},
        "data": {**data, "crop_size": [64, 64], "test_split": "test"},
        "student": {"backbone": RESNET, "fpn": {"fpn_channels": 8, "head_channels": 8}},
        "teacher": {"config": network, "fit": {"max_steps": 4}},
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings))
    return str(file)


def start(folder: Path, before: Callable[[], None] = lambda: None) -> int:
    """Starts the command in a fork, with its output in a log; returns the process."""
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        before()
        code = train.main([str(folder / "recipe.yaml")])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def outcome(folder: Path) -> dict[str, Any]:
    """What must be equal after an interruption: scores and steps of all arms, and all their weights."""
    results = json.loads((folder / "run" / "results.json").read_text())
    arms = [{key: arm[key] for key in ("name", "scores", "steps", "parameters")} for arm in results["arms"]]
    for arm in arms:
        timing = ("runtime", "_per_second")
        arm["scores"] = {key: value for key, value in arm["scores"].items() if not key.endswith(timing)}
    weights = {name: load_file(folder / "run" / name / "model.safetensors") for name in STUDENTS}
    return {"arms": arms, "weights": weights, "gap": results["gap_closed"]}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    found = [key for key in ("arms", "gap") if one[key] != other[key]]
    for name, state in one["weights"].items():
        found += [
            f"{name}/{key}" for key, value in state.items() if not torch.equal(value, other["weights"][name][key])
        ]
    return found


def at_operation(folder: Path, number: int, act: Callable[[], None]) -> Callable[[], None]:
    """Installs a hook that acts before this file operation in the run's folder, counted from 1; 0 only counts."""
    inside, seen = str(folder / "run"), [0]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event not in OPERATIONS or not any(
            isinstance(arg, str | Path) and str(arg).startswith(inside) for arg in args
        ):
            return
        if event == "open" and not (args[1] and set(str(args[1])) & set("wxa+")) and not args[2] & os.O_WRONLY:
            return
        seen[0] += 1
        if seen[0] == number:
            act()
        elif number == 0:
            (folder / "count").write_text(str(seen[0]))

    return lambda: sys.addaudithook(hook)


def full_disk(folder: Path, size: int) -> Callable[[], None]:
    """Files cannot grow beyond a size, as on a disk without space; torch and safetensors write past Python's hooks."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def signals(process: int, first: float, kind: int, times: int) -> None:
    """Sends a signal after some seconds, once or twice."""
    for _ in range(times):
        time.sleep(first)
        os.kill(process, kind)
        first = 0.05


def trial(folder: Path, reference: dict[str, Any], end: Callable[[Path], int]) -> dict[str, Any]:
    """One interrupted run: how the first call ended, how many more it took, and what differs from the reference."""
    recipe(folder)
    codes = [end(folder)]
    while codes[-1] != 0 and len(codes) < 4:
        codes.append(wait(start(folder)))
    log = (folder / "log.txt").read_text()
    wrong = differences(reference, outcome(folder)) if codes[-1] == 0 else [f"never ended:\n{log[-3000:]}"]
    # A second Ctrl-C may fall into a destructor, whose exceptions Python prints and ignores.
    told = log.count("Traceback (most recent call last)") - log.count("Exception ignored")
    wrong += ["a traceback in the log:\n" + log[-3000:]] if told > 0 else []
    if not wrong:
        shutil.rmtree(folder)
    return {"trial": folder.name, "codes": codes, "wrong": wrong}


def trials(root: Path, kind: str, count: int, total: int, seconds: float) -> list[tuple[str, Callable[[Path], int]]]:
    """The ways in which the first calls end: name and function."""
    draw = random.Random(kind)
    made: list[tuple[str, Callable[[Path], int]]] = []
    for index in range(count):
        number = 1 + (index * total) // count
        moment = draw.uniform(0.02, 1.0) * seconds
        size = 200 * 4**index if kind == "size" else 0
        if kind == "kill":
            act = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
            made.append((f"{kind}-{number}", lambda f, n=number, a=act: wait(start(f, at_operation(f, n, a)))))
        elif kind == "full":
            made.append((f"{kind}-{number}", lambda f, n=number: wait(start(f, at_operation(f, n, no_space)))))
        elif kind == "size":
            made.append((f"{kind}-{size}", lambda f, s=size: wait(start(f, full_disk(f, s)))))
        else:
            signum, times = getattr(signal, kind.split("x")[0]), int(kind.partition("x")[2] or 1)
            made.append((f"{kind}-{moment:.3f}", lambda f, m=moment, s=signum, t=times: interrupted(f, m, s, t)))
    return made


def interrupted(folder: Path, moment: float, signum: int, times: int) -> int:
    process = start(folder)
    signals(process, moment, signum, times)
    return wait(process)


def main(root: Path, kinds: list[str]) -> None:
    """Kinds: `kill:60`, `full:10`, `size:10`, `SIGKILL:40`, `SIGTERM:5`, `SIGINTx2:5`."""
    torch.set_num_threads(1)
    whole = root / "whole"
    recipe(whole)
    began = time.perf_counter()
    code = wait(start(whole, at_operation(whole, 0, no_space)))
    seconds = time.perf_counter() - began
    assert code == 0, (whole / "log.txt").read_text()[-3000:]
    reference, total = outcome(whole), int((whole / "count").read_text())
    print(json.dumps({"operations": total, "seconds": seconds}), flush=True)
    for kind, _, count in (word.partition(":") for word in kinds):
        for name, end in trials(root, kind, int(count), total, seconds):
            print(json.dumps(trial(root / name, reference, end)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
