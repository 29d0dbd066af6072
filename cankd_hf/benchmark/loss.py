"""`python -m cankd_hf.benchmark loss`: the CanKD loss against its published form and against the machine."""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from torch import Tensor

from cankd_hf.benchmark.measure import Machine, busy, cpu_of, free_memory, interleaved, peak_extra, table, this_machine
from cankd_hf.commands import check_file
from cankd_hf.errors import InputError
from cankd_hf.json_text import to_json
from cankd_hf.losses import CanKDLoss
from cankd_hf.losses.affinities import AFFINITIES

SIZES = "25x42,50x84,100x168,200x336,64x128x2048"
QUICK = "6x10,12x20x16,24x40x16"
DTYPES = ("float32", "bfloat16", "float16", "float64")
CHANNELS = 256
GROWTH = ((50, 84), (200, 336))  # the two sizes between which the growth exponent is taken


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
        """Values in one map of the whole batch."""
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
    cpu: float | None = None  # user + system seconds beside the wall-clock
    naive_cpu: float | None = None
    memory: int | None = None
    memory_over_maps: float | None = None
    naive_memory: int | None = None
    autocast: float | None = None  # the published form under autocast, for maps in half precision on a GPU
    over_autocast: float | None = None
    compiled: float | None = None  # ours by torch.compile, and the same replayed as a CUDA graph
    graphs: float | None = None
    floor: float | None = None
    share: float | None = None
    note: str = ""


def run(args: argparse.Namespace) -> list[Row]:
    """Measures all rows and prints them as one table; see `python -m cankd_hf.benchmark loss --help`."""
    sizes, affinities, dtype, device = _checked(args)
    check_file(args.json, "--json")
    if args.threads:
        torch.set_num_threads(args.threads)
    console = Console(width=max(Console().width, 200))
    args.clock = time.process_time if args.cpu_time else time.perf_counter
    machine = this_machine(device, 3 if args.quick else 15, args.clock, dtype)
    clock = "CPU time" if args.cpu_time else "wall-clock"
    if args.busy:
        clock += f" beside {args.busy} busy process{'es' * (args.busy > 1)}"
    console.print(
        f"{machine.name}; {clock}; maps {args.dtype}; matrix products {machine.flops / 1e9:.0f} GFLOP/s, "
        f"copy {machine.bandwidth / 1e9:.1f} GB/s"
    )
    rows = []
    for size in sizes:
        for affinity in affinities:
            with console.status(f"{size} {affinity}"):
                rows.append(_row(size, affinity, dtype, device, machine, args))
    cells = [_cells(row) for row in rows]
    columns = [name for name in cells[0] if any(row[name] for row in cells) or name == "note"]
    lines = ([row[name] for name in columns] for row in cells)
    shown = table("CanKD loss, forward + backward", columns, lines, left=2)
    for column in shown.columns[:-1]:
        column.no_wrap = True
    shown.columns[-1].justify = "left"
    console.print(shown)
    for affinity in affinities:
        exponent = growth(rows, affinity)
        if exponent is not None:
            console.print(f"time over pixels, {affinity}, 50x84 to 200x336: exponent {exponent:.3f}")
    if args.json:
        Path(args.json).write_text(to_json({"machine": asdict(machine), "rows": [asdict(row) for row in rows]}))
    return rows


def growth(rows: list[Row], affinity: str) -> float | None:
    """Exponent of time over pixels between the ends of GROWTH; None unless both were measured."""
    timed = [row for row in rows if row.affinity == affinity and row.ours]
    ends = []
    for h, w in GROWTH:
        ends += [(row.ours, row.positions) for row in timed if row.ours and row.size.startswith(f"{h}x{w} ")][:1]
    if len(ends) != len(GROWTH):
        return None
    (first, few), (last, many) = ends
    return math.log(last / first) / math.log(many / few)


def flops(size: Size, affinity: str) -> float:
    """Operations of forward and backward in our form, D = C / 2, without those that do not grow with the map."""
    channels = size.channels
    one = AFFINITIES[affinity].flops(size.positions, size.keys, channels, max(channels // 2, 1))
    return float(size.batch * one)


def naive_bytes(size: Size, affinity: str) -> int:
    """Least memory of the published form: affinities [B, N, M] held at once in its backward pass, float32."""
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
    # on raw channels a softmax of unit-variance maps would be close to one-hot; a quarter keeps it soft
    student = (student.detach() / 4).requires_grad_()
    teacher = torch.randn(shape, device=device, dtype=dtype)

    def ours() -> None:
        _step(loss, student, loss(student, teacher))

    def naive() -> None:
        _step(loss, student, loss.published(student.to(loss.w.weight), teacher.to(loss.w.weight))[1])

    def autocast() -> None:
        with torch.autocast(device.type, dtype):
            value = loss.published(student, teacher)[1]
        _step(loss, student, value)

    row.note = "" if args.no_naive else _too_large(size, affinity, machine, device, args.seconds)
    forms = {"ours": ours}
    if not args.no_naive and not row.note:
        forms["naive"] = naive
        if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
            forms["autocast"] = autocast
    if args.compile:
        forms |= _compiled(loss, student, teacher)
    noted: dict[str, list[float]] = {name: [] for name in forms}
    runs = [cpu_of(form, noted[name]) for name, form in forms.items()]
    with busy(args.busy):
        taken = interleaved(runs, args.repeats if row.floor < 5 else 1, device, args.clock)
    times = dict(zip(forms, taken, strict=True))
    # on busy cores the best run is the one that met nobody
    typical = median if args.busy else min
    for name, values in times.items():
        setattr(row, name, typical(values))
    row.cpu = median(noted["ours"][1:])
    row.naive_cpu = median(noted["naive"][1:]) if "naive" in forms else None
    row.speedup, row.over_autocast = (
        median(slow / fast for fast, slow in zip(times["ours"], times[name], strict=True)) if name in times else None
        for name in ("naive", "autocast")
    )
    row.share = row.floor / typical(times["ours"])
    row.memory = peak_extra(ours, device)
    row.memory_over_maps = row.memory / (2 * size.values * element)
    row.naive_memory = peak_extra(naive, device) if "naive" in forms else None
    return row


def _compiled(loss: CanKDLoss, student: Tensor, teacher: Tensor) -> dict[str, Callable[[], None]]:
    """The loss by torch.compile, on a GPU also replayed as a CUDA graph."""
    torch._dynamo.reset()  # each row compiles its own shape
    modes = {"compiled": None, "graphs": "reduce-overhead"} if student.is_cuda else {"compiled": None}

    def run(form: Callable[..., Tensor]) -> None:
        _step(loss, student, form(student, teacher))

    return {name: partial(run, torch.compile(loss, fullgraph=True, mode=mode)) for name, mode in modes.items()}


def _step(loss: CanKDLoss, student: Tensor, value: Tensor) -> None:
    """One backward pass into fresh gradients, which count as memory of the loss."""
    student.grad = None
    loss.zero_grad(set_to_none=True)
    value.backward()
    student.grad = None


def _too_large(size: Size, affinity: str, machine: Machine, device: torch.device, seconds: float) -> str:
    """Why not to run the published form; empty if it fits."""
    need = naive_bytes(size, affinity)
    if need > 0.6 * free_memory(device):
        return f"naive would need {need / 2**30:.1f} GiB"
    # two products of [N, M] by D forward, twice that back
    least = 12 * size.batch * size.positions * size.keys * max(size.channels // 2, 1) / machine.flops
    return f"naive would take over {least:.0f} s and {need / 2**30:.1f} GiB" if least > seconds else ""


def _cells(row: Row) -> dict[str, str]:
    """Column -> text of one row."""
    return {
        "level": row.size,
        "affinity": row.affinity,
        "ours": _shown(row.ours, "{:.2f} ms", 1e3),
        "naive": _shown(row.naive, "{:.1f} ms", 1e3),
        "speedup": _shown(row.speedup, "{:.1f}x"),
        "autocast": _shown(row.autocast, "{:.2f} ms", 1e3),
        "over autocast": _shown(row.over_autocast, "{:.1f}x"),
        "compiled": _shown(row.compiled, "{:.2f} ms", 1e3),
        "CUDA graph": _shown(row.graphs, "{:.2f} ms", 1e3),
        "CPU": _shown(row.cpu, "{:.1f} ms", 1e3),
        "naive CPU": _shown(row.naive_cpu, "{:.1f} ms", 1e3),
        "extra memory": _shown(row.memory, "{:.0f} MiB", 2**-20),
        "/ two maps": _shown(row.memory_over_maps, "{:.2f}x"),
        "naive memory": _shown(row.naive_memory, "{:.0f} MiB", 2**-20),
        "floor": _shown(row.floor, "{:.2f} ms", 1e3),
        "share": _shown(row.share, "{:.0%}"),
        "note": row.note,
    }


def _shown(value: float | None, text: str, unit: float = 1) -> str:
    return "" if value is None else text.format(value * unit)


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
    if args.busy < 0:
        problems.append(f"--busy: expected at least 0, got {args.busy}; give a number of processes")
    if args.cpu_time and (args.device != "cpu" or args.threads != 1):
        problems.append("--cpu-time: expected --threads 1 on the CPU, where it is meaningful; add --threads 1")
    if args.dtype not in DTYPES:
        problems.append(f"--dtype: expected one of {', '.join(DTYPES)}, got {args.dtype!r}; choose one of them")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        problems.append("--device: expected a device of this machine, got cuda without a GPU; use --device cpu")
    if problems:
        raise InputError(problems)
    return sizes, affinities, getattr(torch, args.dtype), torch.device(args.device)
