"""`python -m cankd_hf.benchmark loss`: the CanKD loss against its published form and against the machine."""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cankd_hf.benchmark.measure import Clock, Machine, free_memory, interleaved, peak_extra, this_machine
from cankd_hf.errors import InputError
from cankd_hf.losses import CanKDLoss
from cankd_hf.losses.affinities import AFFINITIES

SIZES = "25x42,50x84,100x168,200x336,64x128x2048"
QUICK = "6x10,12x20x16,24x40x16"
DTYPES = ("float32", "bfloat16", "float16", "float64")
CHANNELS = 256
GROWTH = ((50, 84), (200, 336))  # the two ends between which the growth exponent is taken


@dataclass(frozen=True)
class Size:
    """One level: batch B, channels C, height and width."""

    batch: int
    channels: int
    height: int
    width: int

    @property
    def positions(self) -> int:
        """N, student positions of one image."""
        return self.height * self.width

    @property
    def keys(self) -> int:
        """M, teacher positions of one image after the 2x2 pool."""
        return (self.height // 2) * (self.width // 2)

    @property
    def values(self) -> int:
        """Values of one map of the whole batch."""
        return self.batch * self.channels * self.positions

    def __str__(self) -> str:
        return f"{self.height}x{self.width} C{self.channels} B{self.batch}"


@dataclass
class Row:
    """One line of the table; times in seconds, memory in bytes, None where not run."""

    size: str
    affinity: str
    positions: int
    ours: float | None = None
    naive: float | None = None
    speedup: float | None = None
    memory: int | None = None
    memory_over_maps: float | None = None
    naive_memory: int | None = None
    floor: float | None = None
    share: float | None = None
    note: str = ""


def run(args: argparse.Namespace) -> list[Row]:
    """Measure all rows and print them as one table; see `python -m cankd_hf.benchmark loss --help`."""
    sizes, affinities, dtype, device = _checked(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    console = Console(width=max(Console().width, 150))
    machine = this_machine(device, 3 if args.quick else 15, _clock(args))
    clock = "CPU time" if args.cpu_time else "wall-clock"
    console.print(
        f"{machine.name}; {clock}; maps {args.dtype}; matrix products {machine.flops / 1e9:.0f} GFLOP/s, "
        f"copy {machine.bandwidth / 1e9:.1f} GB/s"
    )
    rows = []
    for size in sizes:
        for affinity in affinities:
            with console.status(f"{size} {affinity}"):
                rows.append(_row(size, affinity, dtype, device, machine, args))
    console.print(_table(rows))
    for affinity in affinities:
        exponent = growth(rows, affinity)
        if exponent is not None:
            console.print(f"time over pixels, {affinity}, 50x84 to 200x336: exponent {exponent:.3f}")
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": asdict(machine), "rows": [asdict(row) for row in rows]}))
    return rows


def growth(rows: list[Row], affinity: str) -> float | None:
    """Exponent of time over pixels between the ends of GROWTH; None unless both were measured."""
    ends = [
        next((row for row in rows if row.affinity == affinity and row.ours and row.size.startswith(f"{h}x{w} ")), None)
        for h, w in GROWTH
    ]
    first, last = ends
    if first is None or last is None:
        return None
    assert first.ours is not None and last.ours is not None
    return math.log(last.ours / first.ours) / math.log(last.positions / first.positions)


def flops(size: Size, affinity: str) -> float:
    """Operations of forward and backward in the form we use, D = C / 2, without what does not grow with the map."""
    channels = size.channels
    one = AFFINITIES[affinity].flops(size.positions, size.keys, channels, max(channels // 2, 1))
    return float(size.batch * one)


def naive_bytes(size: Size, affinity: str) -> int:
    """Least memory of the published form: affinities [B, N, M] alive at once in its backward pass, float32."""
    copies = AFFINITIES[affinity].published_copies(max(size.channels // 2, 1))
    return 4 * copies * size.batch * size.positions * size.keys


def _row(
    size: Size, affinity: str, dtype: torch.dtype, device: torch.device, machine: Machine, args: argparse.Namespace
) -> Row:
    torch.manual_seed(0)
    row = Row(str(size), affinity, size.positions)
    element = torch.empty((), dtype=dtype).element_size()
    # both maps are read forward and backward, the student's gradient is written
    row.floor = machine.floor(flops(size, affinity), 5 * size.values * element)
    if row.floor > args.seconds:
        row.note = f"skipped: at least {row.floor:.0f} s"
        return row
    loss = CanKDLoss(size.channels, affinity=affinity).to(device)
    if loss.output_norm is not None:
        torch.nn.init.ones_(loss.output_norm.weight)
    shape = (size.batch, size.channels, size.height, size.width)
    student = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    # on raw channels a softmax of unit-variance maps would be a hard choice; a quarter keeps it soft
    student = (student.detach() / 4).requires_grad_()
    teacher = torch.randn(shape, device=device, dtype=dtype)

    def ours() -> None:
        _step(loss, student, loss(student, teacher))

    def naive() -> None:
        _step(loss, student, loss.published(student.to(loss.w.weight), teacher.to(loss.w.weight))[1])

    fits, row.note = _fits(size, affinity, machine, device, args)
    times = interleaved([ours, naive] if fits else [ours], args.repeats if row.floor < 5 else 1, device, _clock(args))
    row.ours = min(times[0])
    row.share = row.floor / row.ours
    row.memory = peak_extra(ours, device)
    row.memory_over_maps = row.memory / (2 * size.values * element)
    if fits:
        row.naive = min(times[1])
        row.speedup = median(slow / fast for fast, slow in zip(*times, strict=True))
        row.naive_memory = peak_extra(naive, device)
    return row


def _clock(args: argparse.Namespace) -> Clock:
    return time.process_time if args.cpu_time else time.perf_counter


def _step(loss: CanKDLoss, student: Tensor, value: Tensor) -> None:
    """One backward pass into fresh gradients, which count as memory of the loss."""
    student.grad = None
    loss.zero_grad(set_to_none=True)
    value.backward()
    student.grad = None


def _fits(
    size: Size, affinity: str, machine: Machine, device: torch.device, args: argparse.Namespace
) -> tuple[bool, str]:
    """Whether to run the published form, and if not why."""
    if args.no_naive:
        return False, ""
    need = naive_bytes(size, affinity)
    if need > 0.6 * free_memory(device):
        return False, f"naive would need {need / 2**30:.1f} GiB"
    # two products of [N, M] by D forward, twice that back
    least = 12 * size.batch * size.positions * size.keys * max(size.channels // 2, 1) / machine.flops
    if least > args.seconds:
        return False, f"naive would take over {least:.0f} s and {need / 2**30:.1f} GiB"
    return True, ""


def _table(rows: list[Row]) -> Table:
    table = Table(title="CanKD loss, forward + backward", title_justify="left")
    for name in _cells(rows[0]):
        text = name in ("level", "affinity", "note")
        table.add_column(name, justify="left" if text else "right", no_wrap=name != "note")
    for row in rows:
        table.add_row(*_cells(row).values())
    return table


def _cells(row: Row) -> dict[str, str]:
    """Column -> text of one row."""
    return {
        "level": row.size,
        "affinity": row.affinity,
        "ours": _ms(row.ours),
        "naive": _ms(row.naive),
        "speedup": "" if row.speedup is None else f"{row.speedup:.1f}x",
        "extra memory": _mib(row.memory),
        "/ two maps": "" if row.memory_over_maps is None else f"{row.memory_over_maps:.2f}x",
        "naive memory": _mib(row.naive_memory),
        "floor": _ms(row.floor),
        "share": "" if row.share is None else f"{row.share:.0%}",
        "note": row.note,
    }


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value * 1e3:.1f} ms"


def _mib(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:.0f} MiB"


def _checked(args: argparse.Namespace) -> tuple[list[Size], list[str], torch.dtype, torch.device]:
    if args.quick:
        args.repeats = 1
    problems = []
    sizes = []
    for text in (args.sizes or (QUICK if args.quick else SIZES)).split(","):
        parts = text.strip().split("x")
        if len(parts) in (2, 3) and all(part.isdecimal() and int(part) > 0 for part in parts):
            height, width, *channels = map(int, parts)
            sizes.append(Size(args.batch, channels[0] if channels else CHANNELS, height, width))
        else:
            problems.append(f"--sizes: expected HxW or HxWxC, got {text!r}; for example 100x168 or 64x128x2048")
    affinities = args.affinities.split(",") if args.affinities else list(AFFINITIES)
    for name in affinities:
        if name not in AFFINITIES:
            problems.append(f"--affinities: expected some of {', '.join(AFFINITIES)}, got {name!r}; choose from them")
    for key in ("batch", "repeats", "threads"):
        value = getattr(args, key)
        if value is not None and value < 1:
            problems.append(f"--{key}: expected at least 1, got {value}; give a positive number")
    if args.cpu_time and (args.device != "cpu" or args.threads != 1):
        problems.append("--cpu-time: expected --threads 1 on the CPU, where it means something; add --threads 1")
    if args.dtype not in DTYPES:
        problems.append(f"--dtype: expected one of {', '.join(DTYPES)}, got {args.dtype!r}; choose one of them")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        problems.append("--device: expected a device of this machine, got cuda without a GPU; use --device cpu")
    if problems:
        raise InputError(problems)
    return sizes, affinities, getattr(torch, args.dtype), torch.device(args.device)
