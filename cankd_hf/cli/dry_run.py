"""What `--dry-run` shows: everything a run would do, and one step of it."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cankd_hf.cli.looking import short_lines
from cankd_hf.cli.plan import print_plan, size_text
from cankd_hf.commands import console as plain_console
from cankd_hf.config.distill import Share
from cankd_hf.config.parts import part_of
from cankd_hf.config.phases import Phase
from cankd_hf.config.recipe import Recipe, recipe_to_yaml
from cankd_hf.data.common.batch import Batch
from cankd_hf.features.taps import Level
from cankd_hf.host import Host, read_host
from cankd_hf.hub.files import read_json
from cankd_hf.names import RESULTS_FILE
from cankd_hf.runs.build import SCORE_ONLY, build_trainer
from cankd_hf.runs.device import device_of, told
from cankd_hf.runs.forecast import Forecast, fit_costs, forecast, whole
from cankd_hf.runs.measured import count, kept_tensors, measure, ready, teacher_bytes, without_weights
from cankd_hf.runs.phases import open_phase, problems_in
from cankd_hf.runs.session import check_session
from cankd_hf.tasks import TASKS, Task, TaskData
from cankd_hf.training.distiller import Distiller
from cankd_hf.training.placing import reads
from cankd_hf.training.trainer import CanKDTrainer


@dataclass
class StepCost:
    """What one training step of one process costs, measured on one real batch."""

    flops: int
    teacher_flops: int
    activations: int
    loss: float
    batch: list[int]


def dry_run(recipe: Recipe, restart: bool = False, host: Host | None = None) -> int:
    """Prints the resolved recipe, models, taps, pairs, sizes and the cost of one step, which it runs. Trains nothing.

    Args:
        recipe: a checked one.
        restart: whether the run is to start over in its folder.
        host: what the command found of this machine.

    Raises:
        InputError: for whatever would stop the real run before its first step.
    """
    check_session(recipe, restart)
    console = plain_console(120)
    console.print(Syntax(recipe_to_yaml(recipe), "yaml", background_color="default", word_wrap=True))
    console.print(told(device_of(recipe.training), recipe), soft_wrap=True, highlight=False)
    data_config = replace(recipe.data, check=min(64, recipe.data.check) if isinstance(recipe.data.check, int) else 64)
    task, data = TASKS[recipe.task].from_data(data_config, labelled=recipe.labelled)
    for line in short_lines(recipe, task, data):
        console.print(line, soft_wrap=True, highlight=False)
    findings: list[str] = []
    planned: list[tuple[str, Forecast]] = []
    if recipe.phases:
        console.print(phases_table(recipe))
    for phase in recipe.phases or ():
        console.print(f"phase {phase.name}", style="bold", highlight=False)
        part = part_of(recipe, phase)
        with problems_in(phase):
            changed = replace(part.data, check=data_config.check)
            own = data if part.data == recipe.data else open_phase(replace(part, data=changed), task, data)
            findings += _dry_part(part, task, own, console, planned, phase)
    if not recipe.phases:
        findings += _dry_part(recipe, task, data, console, planned)
    if planned:
        with tempfile.TemporaryDirectory() as scratch:
            fits = fit_costs(recipe, task, data, Path(scratch))
        total = whole([part for _, part in planned], fits, recipe.baseline)
        print_plan(console, planned, list(fits.values()), total, recipe.output_dir, host or read_host(seconds=0.0))
    # Whether a teacher scores below its student is known only from an earlier run of the recipe.
    earlier = read_json(Path(recipe.output_dir) / RESULTS_FILE).get("findings", [])
    for finding in dict.fromkeys([*findings, *earlier]):
        console.print(f"Warning: {finding}", soft_wrap=True, highlight=False, markup=False)
    return 0


def _dry_part(
    recipe: Recipe,
    task: Task,
    data: TaskData,
    console: Console,
    planned: list[tuple[str, Forecast]],
    phase: Phase | None = None,
) -> list[str]:
    """Builds and prints one part of a run, runs one step of it, and adds what it will take to those that are planned;
    returns what is wrong with its teachers."""
    with tempfile.TemporaryDirectory() as scratch:  # the Trainer makes its output folder at once
        trainer = build_trainer(recipe, task, data, Path(scratch), **SCORE_ONLY, disable_tqdm=True)
    distiller = trainer.distiller
    shapes = {"student": distiller.levels, **{name: shape.levels for name, shape in distiller.teachers.items()}}
    for title, levels in shapes.items():
        if levels:
            console.print(levels_table(title, levels))
    if distiller.objective.terms:
        console.print(pairs_table(distiller))
    console.print(_sizes_table(trainer))
    if images := trainer.images_told():
        console.print(images, soft_wrap=True, highlight=False)
    model, inputs = ready(trainer)
    cost = measure_step(trainer, model, inputs)
    console.print(_cost_table(trainer, cost))
    trainer.guard.check_loss()
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        console.print("No plan of the time: FSDP and DeepSpeed divide the weights only when they train.")
    else:
        made = forecast(recipe, trainer, data, measure(trainer, model, inputs), phase)
        planned.append((phase.name if phase is not None else "", made))
    return list(trainer.health.findings)


def phases_table(recipe: Recipe) -> Table:
    """The phases of a recipe, one a row: steps, losses, frozen parts and what else differs."""
    table = Table(title="phases", title_justify="left")
    for name in ("phase", "share", "task weight", "terms", "frozen", "connectors", "changes"):
        table.add_column(name)
    for phase in recipe.phases or ():
        part = part_of(recipe, phase).distill
        changes = [f"data.{key}={value}" for key, value in phase.data.items()]
        changes += [f"training.{key}={value}" for key, value in phase.training.items()]
        terms = ", ".join(term.label for term in part.terms) or "-"
        carried = "carried" if phase.carry == "connectors" else "fresh"
        row = (f"{part.task_weight:g}", terms, ", ".join(part.frozen or ()) or "-", carried, "\n".join(changes) or "-")
        table.add_row(phase.name, f"{phase.share:.1%}", *row)
    return table


def levels_table(title: str, levels: Sequence[Level]) -> Table:
    """The maps of one model, one a row."""
    table = Table(title=f"{title} maps", title_justify="left")
    for name in ("level", "tap", "stride", "channels", "height x width"):
        table.add_column(name, justify="left" if name == "tap" else "right")
    for index, level in enumerate(levels):
        size = f"{level.size[0]} x {level.size[1]}"
        table.add_row(str(index), level.tap, f"{level.stride:g}", str(level.channels), size)
    return table


def pairs_table(distiller: Distiller) -> Table:
    """The pairs of student and teacher levels, with term, weight, connector, and conditioning if there is any."""
    table = Table(title="pairs", title_justify="left")
    several = ["teacher"] if len(distiller.teachers) > 1 else []
    conditioned = ["conditioning"] if distiller.conditioning else []
    for name in ("term", "student level", *several, "teacher level", "weight", "connector", *conditioned):
        table.add_column(name)
    for item in distiller.placed:
        ours, theirs, shown = reads(item.term), reads(item.term), "none"
        if item.pair is not None:
            ours, theirs = str(item.pair.student), str(item.pair.teacher)
            connector = str(distiller.connectors[item.pair.name].projection).partition(",")[0]
            shown = "none, channels agree" if connector.startswith("Identity") else "1x1 convolution"
        last = [item.term.conditioning] if conditioned else []
        middle = [item.teacher] if several else []
        asked = item.term.weight
        weight = f"share {asked.share:g}" if isinstance(asked, Share) else f"{item.weight:g}"
        table.add_row(item.term.label, ours, *middle, theirs, weight, shown, *last)
    return table


def _sizes_table(trainer: CanKDTrainer) -> Table:
    distiller = trainer.distiller
    table = Table(title="parameters", title_justify="left")
    table.add_column("part")
    table.add_column("parameters", justify="right")
    table.add_row("student", f"{count(distiller.student):,}")
    extra = count(distiller) - count(distiller.student)
    table.add_row("distillation modules (discarded after training)", f"{extra:,}")
    for name, teacher in trainer.teachers.items():
        table.add_row(f"{name} (frozen)", f"{teacher.num_parameters():,}")
    return table


def measure_step(trainer: CanKDTrainer, model: nn.Module, inputs: dict[str, Any]) -> StepCost:
    """Runs forward and backward of one batch and counts FLOPs, matrix products of attention and losses included, and
    the bytes autograd keeps between the two."""
    teacher_flops, kept = 0, dict[int, int]()
    if trainer.teachers:
        with FlopCounterMode(display=False) as counter:
            trainer.source(Batch(inputs))
        teacher_flops = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        with kept_tensors(kept), trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, dict(inputs))
        loss.backward()
    model.zero_grad()
    batch = list(inputs["pixel_values"].shape)
    return StepCost(counter.get_total_flops(), teacher_flops, without_weights(kept, model), loss.item(), batch)


def _cost_table(trainer: CanKDTrainer, cost: StepCost) -> Table:
    distiller = trainer.distiller
    # Weight, gradient and AdamW's two moments in float32; the frozen teacher has its weights only.
    state = 16 * count(distiller)
    teacher = teacher_bytes(trainer)
    table = Table(title=f"one step of one process, batch {cost.batch}", title_justify="left")
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_row("FLOPs, forward and backward", f"{cost.flops / 1e9:,.1f} G")
    table.add_row("  of which forward of the teachers", f"{cost.teacher_flops / 1e9:,.1f} G")
    table.add_row("memory: weights, gradients, AdamW state", size_text(state))
    table.add_row("memory: weights of the teachers", size_text(teacher))
    table.add_row("memory: activations kept for backward", size_text(cost.activations))
    table.add_row("memory: estimated total", size_text(state + teacher + cost.activations))
    table.add_row("loss", f"{cost.loss:.4f}")
    return table
