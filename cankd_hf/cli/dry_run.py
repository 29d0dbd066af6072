"""What `--dry-run` shows: everything a run would do, and one step of it."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.syntax import Syntax
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cankd_hf.commands import console as plain_console
from cankd_hf.config.distill import Share
from cankd_hf.config.recipe import Recipe, recipe_to_yaml
from cankd_hf.data.common.batch import Batch
from cankd_hf.features.taps import Level
from cankd_hf.hub.files import read_json
from cankd_hf.names import RESULTS_FILE
from cankd_hf.runs.build import SCORE_ONLY, build_trainer
from cankd_hf.runs.device import device_of, told
from cankd_hf.runs.session import check_session
from cankd_hf.tasks import TASKS
from cankd_hf.training.distiller import Distiller
from cankd_hf.training.placing import reads
from cankd_hf.training.trainer import CanKDTrainer


def size_text(size: float) -> str:
    """Bytes as a person reads them: `12.3 MiB`, `4.56 GiB`."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


@dataclass
class StepCost:
    """What one training step of one process costs, measured on one real batch."""

    flops: int
    teacher_flops: int
    activations: int
    loss: float
    seconds: float
    batch: list[int]


def dry_run(recipe: Recipe, restart: bool = False) -> int:
    """Prints the resolved recipe, models, taps, pairs, sizes and the cost of one step, which it runs. Trains nothing.

    Raises:
        InputError: for whatever would stop the real run before its first step.
    """
    check_session(recipe, restart)
    console = plain_console(120)
    console.print(Syntax(recipe_to_yaml(recipe), "yaml", background_color="default"))
    console.print(told(device_of(recipe.training), recipe), soft_wrap=True, highlight=False)
    data_config = replace(recipe.data, check=min(64, recipe.data.check) if isinstance(recipe.data.check, int) else 64)
    task, data = TASKS[recipe.task].from_data(data_config, labelled=recipe.distill.task_weight > 0)
    with tempfile.TemporaryDirectory() as scratch:  # the Trainer makes its output folder at once
        trainer = build_trainer(recipe, task, data, Path(scratch), **SCORE_ONLY)
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
    cost = measure_step(trainer)
    console.print(_cost_table(trainer, cost))
    trainer.guard.check_loss()
    # Whether a teacher scores below its student is known only from an earlier run of the recipe.
    earlier = read_json(Path(recipe.output_dir) / RESULTS_FILE).get("findings", [])
    for finding in dict.fromkeys([*trainer.health.findings, *earlier]):
        console.print(f"Warning: {finding}", soft_wrap=True, highlight=False, markup=False)
    return 0


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


def count(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


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


def measure_step(trainer: CanKDTrainer) -> StepCost:
    """Runs forward and backward of one batch and counts FLOPs, matrix products of attention and losses included, and
    the bytes autograd keeps between the two."""
    trainer.args.conditioning_batches = 1  # a run measures more, before its first step
    trainer.measure_conditioning()
    inputs: Any = next(iter(trainer.get_train_dataloader()))
    inputs = trainer._prepare_inputs(inputs)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # these prepare a model only with its optimizer
        model: nn.Module = trainer.distiller.to(trainer.args.device)
    else:
        model = trainer.accelerator.prepare_model(trainer.model, device_placement=True)
    model.train()
    # The schedule's factor is 0 at step 0 of a warm-up: look at a step in the middle of the run.
    trainer.state.max_steps, trainer.state.global_step = 1000, 500
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    teacher_flops = 0
    if trainer.teachers:
        with FlopCounterMode(display=False) as counter:
            trainer.source(Batch(inputs))
        teacher_flops = counter.get_total_flops()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    start = time.perf_counter()
    saving = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with FlopCounterMode(display=False) as counter:
        with saving, trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, inputs)
        loss.backward()
    seconds = time.perf_counter() - start
    model.zero_grad()
    activations = sum(size for pointer, size in kept.items() if pointer not in weights)
    batch = list(inputs["pixel_values"].shape)
    return StepCost(counter.get_total_flops(), teacher_flops, activations, loss.item(), seconds, batch)


def _cost_table(trainer: CanKDTrainer, cost: StepCost) -> Table:
    distiller = trainer.distiller
    # Weight, gradient and AdamW's two moments in float32; the frozen teacher has its weights only.
    state = 16 * count(distiller)
    frozen = [parameter for teacher in trainer.teachers.values() for parameter in teacher.parameters()]
    teacher = sum(parameter.numel() * parameter.element_size() for parameter in frozen)
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
    table.add_row("seconds (first step, with warm-up and counting)", f"{cost.seconds:.2f}")
    return table
