"""`python -m cankd_hf.doctor`: what this machine has, and what of it makes training slow or impossible."""

import argparse
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

from cankd_hf.commands import command_parser, console, exit_code, importing
from cankd_hf.host import Host, Load, cpu_bf16, read_host

EXAMPLES = """examples:
  python -m cankd_hf.doctor
  python -m cankd_hf.doctor --offline

exit codes: 0 all is well or only slow, 1 something that is needed is missing"""
_GIB = 1024**3
_HIDING = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
_LEAST_DISK, _LEAST_MEMORY = 5 * _GIB, 2 * _GIB


class Finding(NamedTuple):
    """One line of the table."""

    what: str
    found: str
    advice: str = ""
    missing: bool = False  # nothing works without it


def parser() -> argparse.ArgumentParser:
    """The command line, without importing anything heavy."""
    made = command_parser(
        "doctor", "Show versions, devices, memory and Hub login, and what is slow and why.", EXAMPLES
    )
    made.add_argument("--offline", action="store_true", help="do not ask the Hub who is signed in")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns the exit code."""
    options = parser().parse_args(argv)
    return exit_code(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    from rich.table import Table

    host = read_host()
    if host.asked is not None and host.processes == 1:  # where it is asked for, a run does not look
        host = replace(host, others=Load().others(host.cores, 0.2))
    with importing():
        findings = [*packages(), *devices(), *machine(host), *hub(options.offline)]
    table = Table(title="this machine", title_justify="left")
    for name in ("", "found", "what to do"):
        table.add_column(name, overflow="fold")
    for finding in findings:
        table.add_row(finding.what, finding.found, finding.advice)
    console(120).print(table)
    return 1 if any(finding.missing for finding in findings) else 0


def packages() -> Iterator[Finding]:
    """Python, this package and what it needs, with versions."""
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    yield Finding(
        "cankd_hf", f"{_version('cankd-hf') or 'not installed: run from a checkout'} in {Path(__file__).parents[1]}"
    )
    from packaging.requirements import Requirement

    try:
        needed = [Requirement(line) for line in requires("cankd-hf") or []]
    except PackageNotFoundError:
        needed = []
    main = [item for item in needed if item.marker is None or item.marker.evaluate({"extra": ""})]
    for item in main:
        have = _version(item.name)
        if have is None:
            yield Finding(item.name, "not installed", f"pip install '{item}'", missing=True)
        elif not item.specifier.contains(have, prereleases=True):
            yield Finding(item.name, have, f"expected {item.specifier}: pip install -U '{item}'", missing=True)
        elif item.name in ("torch", "torchvision", "transformers", "accelerate", "datasets", "timm"):
            yield Finding(item.name, have)
    absent = sorted(
        {item.name for item in needed if item not in main and _version(item.name) is None}
        & {"onnx", "onnxruntime", "onnxscript"}
    )
    if absent:
        advice = f"for ONNX files: pip install {' '.join(absent)}"
        yield Finding("export", f"{', '.join(absent)} not installed", advice)


def devices() -> Iterator[Finding]:
    """The accelerators that torch sees, and the CPU."""
    import torch

    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind is None:
        yield Finding("accelerator", "none", _without_accelerator())
    for index in range(torch.accelerator.device_count() if kind is not None else 0):
        if kind is not None and kind.type == "cuda":
            found = torch.cuda.get_device_properties(index)
            free = torch.cuda.mem_get_info(index)[0] / _GIB
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            slow = "" if bf16 else "no bf16: set training.fp16 rather than training.bf16"
            yield Finding(
                f"cuda:{index}", f"{found.name}, {free:.1f} of {found.total_memory / _GIB:.1f} GiB free", slow
            )
        else:
            yield Finding(f"{kind}:{index}", "there")
    capability = torch.backends.cpu.get_cpu_capability()
    fast = cpu_bf16()
    yield Finding(
        "cpu",
        f"{capability}, bf16 instructions: {'yes' if fast else 'no'}",
        "" if fast or kind else "set training.bf16=false where a recipe has bf16: here it is slower",
    )


def _without_accelerator() -> str:
    import torch

    built = torch.version.cuda or getattr(torch.version, "hip", None)
    hidden = next((name for name in _HIDING if os.environ.get(name, "0") in ("", "-1")), None)
    if built and hidden is not None:
        return f"{hidden} hides all GPUs; unset it to train on one"
    if built and shutil.which("nvidia-smi"):
        return "torch is built for a GPU and finds none: look at nvidia-smi (driver, container options)"
    return "training runs on the CPU: small students and images; see docs/scaling.md"


def machine(host: Host) -> Iterator[Finding]:
    """Cores, threads, memory and disk."""
    import psutil

    threads = host.asked or f"{host.threads()} will be used"
    busy = f", {host.others:.1f} in use by other programs" if host.others >= 0.1 else ""
    advice = "other programs keep cores busy: steps take longer, and threads sleep in barriers" if host.shared else ""
    single = host.asked is not None and host.asked.partition("=")[2].partition(",")[0] == "1"
    idle = host.threads() - 1  # cores that are free beside the one that is used
    asked = single and idle > 0
    yield Finding(
        "cores",
        f"{host.cores}{busy}; threads: {threads}",
        f"{host.asked} leaves {idle} core{'s' if idle > 1 else ''} idle: unset it for one run at a time"
        if asked
        else advice,
    )
    memory = psutil.virtual_memory()
    low = "close programs, or make batches and images smaller" if memory.available < _LEAST_MEMORY else ""
    yield Finding("memory", f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free", low)
    cache = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    for name, folder in {
        "here": Path.cwd(),
        "Hub cache": Path(cache).expanduser(),
        "temporary": Path(tempfile.gettempdir()),
    }.items():
        place = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
        free = shutil.disk_usage(place).free
        low = "free space: checkpoints and downloads take gigabytes" if free < _LEAST_DISK else ""
        if not os.access(place, os.W_OK):
            low = "cannot be written; work in another folder (HF_HOME, TMPDIR)"
        yield Finding(f"disk ({name})", f"{free / _GIB:.1f} GiB free in {folder}", low)


def hub(offline: bool) -> Iterator[Finding]:
    """Whether the Hub is asked, and as whom."""
    from huggingface_hub import constants, get_token, whoami
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    if constants.HF_HUB_OFFLINE:
        yield Finding("Hub", "not asked (HF_HUB_OFFLINE)", "only local folders and what is in the cache load")
        return
    token = get_token()
    if token is None:
        yield Finding("Hub", "nobody is signed in", "for pushes and gated models: hf auth login")
        return
    if offline:
        yield Finding("Hub", "a token is there; not asked whose (--offline)")
        return
    try:
        yield Finding("Hub", f"signed in as {whoami(token)['name']}")
    except (HfHubHTTPError, HTTPError, OSError) as error:
        said = type(error).__name__
        yield Finding(
            "Hub", f"a token is there, and asking whose failed ({said})", "hf auth login, or look at the network"
        )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
