"""Seconds, memory and bytes of the parts of a step, measured on this machine with one batch of a run."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from cankd_hf.data.common.batch import Batch
from cankd_hf.teachers.codecs import Rows, fields_of, make_codec, output_of
from cankd_hf.teachers.pictures import Grid, cut_out
from cankd_hf.teachers.source import LiveTeachers
from cankd_hf.training.caching import BESIDE
from cankd_hf.training.trainer import CanKDTrainer

logger = logging.getLogger(__name__)
MOST, LEAST = 7, 2  # laps of each part, beside the first one, which warms up
LIMIT = 15.0  # seconds after which no further lap begins, where there are at least two
LONG_LAP = 20.0  # seconds: a part whose first lap took longer has no other


@dataclass
class Measured:
    """The parts of one step of one process.

    Attributes:
        images: of a batch.
        seconds: laps of each part by name: `read` and `reread` (a batch, by one loading process, and
            the same images once more, as with `data.cache`), `alone` and `live` (forward and
            backward of the student, without and with the teachers), `replayed` (with stored answers), `cut` (answers
            for whole images, cut for a batch), `teachers`, `optimizer`, `evaluation` (a batch). Parts that a recipe
            lacks are not there.
        memory: bytes of `alone` and `live`: weights, gradients, AdamW state and activations, or on a GPU the peak.
        answer: bytes of one stored answer of each teacher.
        evaluated: images of an evaluation batch.
        processes: that train together, each with such a batch.
    """

    images: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    answer: dict[str, int] = field(default_factory=dict)
    evaluated: int = 0
    processes: int = 1

    def median(self, name: str) -> float:
        """The median of a part's laps; 0 for one that is not there."""
        return statistics.median(self.seconds[name]) if self.seconds.get(name) else 0.0

    @property
    def laps(self) -> int:
        """The smallest number of laps that a step's median is of."""
        return min((len(laps) for name, laps in self.seconds.items() if name in ("alone", "live")), default=0)

    @property
    def spread(self) -> float:
        """How far the laps of a step are from their median, at most, relative to it."""
        found = [
            max(abs(lap / self.median(name) - 1) for lap in self.seconds[name])
            for name in ("alone", "live")
            if self.median(name)
        ]
        return max(found, default=0.0)


def ready(trainer: CanKDTrainer) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a trainer, set up for a step in the middle of a run, and a batch on its device."""
    for name in trainer.caches:
        trainer.place_teacher(name)
    trainer.source, trainer._unopened = LiveTeachers(trainer.teachers), []  # stores are written by runs alone
    trainer.args.conditioning_batches, asked = 1, trainer.args.conditioning_batches  # a run measures more
    trainer.measure_conditioning()
    trainer.args.conditioning_batches = asked
    inputs: Any = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # these prepare a model only with its optimizer
        model: nn.Module = trainer.distiller.to(trainer.args.device)
    else:
        model = trainer.accelerator.prepare_model(trainer.model, device_placement=True)
    model.train()
    # The schedule's factor is 0 at step 0 of a warm-up.
    trainer.state.max_steps, trainer.state.global_step = 1000, 500
    return model, inputs


def count(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def teacher_bytes(trainer: CanKDTrainer) -> int:
    """Bytes of the weights of all teachers."""
    frozen = [parameter for teacher in trainer.teachers.values() for parameter in teacher.parameters()]
    return sum(parameter.numel() * parameter.element_size() for parameter in frozen)


@contextmanager
def kept_tensors(kept: dict[int, int]) -> Iterator[None]:
    """Notes the storages that autograd keeps for backward: pointer -> bytes."""

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield


def without_weights(kept: Mapping[int, int], model: nn.Module) -> int:
    """Bytes of the noted storages that are no weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(size for pointer, size in kept.items() if pointer not in weights)


class _Step:
    """The parts of a step, each of which can be run again."""

    def __init__(self, trainer: CanKDTrainer, model: nn.Module, inputs: dict[str, Any]) -> None:
        self.trainer, self.model, self.inputs = trainer, model, inputs
        trainer.create_optimizer_and_scheduler(num_training_steps=1000)
        optimizer = trainer.optimizer
        assert optimizer is not None
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # measured, and nothing moves
        self.optimize, self.clear = optimizer.step, optimizer.zero_grad
        self.live_source: Any = trainer.source
        self.answers: dict[str, Any] = {}
        self.rows: dict[str, tuple[Rows, str, Tensor]] = {}

    def parts(self) -> dict[str, Callable[[], object]]:
        """Those that the recipe has."""
        found: dict[str, Callable[[], object]] = {}
        if self.alone():
            found["alone"] = self.alone
        if self.trainer.teachers:
            found |= {"teachers": self.teachers, "live": self.live, "replayed": self.replayed}
            found |= {"cut": self.cut} if self.trainer.can_store_whole_images else {}
        elif "alone" not in found:
            found["live"] = self.live
        return {**found, "optimizer": self.optimizer}

    def alone(self) -> bool:
        """Forward and backward of the student without teachers; False where nothing has a gradient."""
        batch = Batch(self.inputs)
        # Several processes would wait for gradients of connectors, which have none here.
        model = self.model if self.trainer.args.world_size == 1 else self.trainer.distiller
        with self.trainer.compute_loss_context_manager():
            loss = model(**batch.inputs, meta=batch.meta).loss
        if loss is None or not loss.requires_grad:
            return False
        loss.backward()
        return True

    def live(self) -> None:
        """Forward and backward with the teachers."""
        with self.trainer.compute_loss_context_manager():
            loss = self.trainer.compute_loss(self.model, dict(self.inputs))
        loss.backward()

    def teachers(self) -> None:
        """Their outputs, as stores keep them."""
        batch = Batch(self.inputs)
        with self.trainer.compute_loss_context_manager():
            self.answers = self.live_source(batch, list(self.trainer.teachers))

    def replayed(self) -> None:
        """The same as `live` with answers out of rows, as a store has them."""
        shapes = self.trainer.distiller.teachers
        self.rows = self.rows or {name: _rows(self.trainer, name, output) for name, output in self.answers.items()}

        def stored(batch: Batch, names: Any = None) -> dict[str, Any]:
            return {
                name: output_of(packed.unpack(layout, content), len(shapes[name].levels))
                for name, (packed, layout, content) in self.rows.items()
                if names is None or name in names
            }

        self.trainer.source = stored
        try:
            self.live()
        finally:
            self.trainer.source = self.live_source

    def cut(self) -> None:
        """What is cut out of answers for whole images: as much as the answers for a batch."""
        for output in self.answers.values():
            for value in [*output.maps, *([] if output.logits is None else [output.logits])]:
                size = value.shape[-2], value.shape[-1]
                boxes = torch.tensor([0.0, 0.0, size[1], size[0]], device=value.device).repeat(len(value), 1)
                cut_out(value, boxes, Grid(size, size))

    def optimizer(self) -> None:
        """Clipping and a step of the optimizer that changes nothing."""
        limit = self.trainer.args.max_grad_norm
        if limit:
            self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        self.optimize()
        self.clear()


def _rows(trainer: CanKDTrainer, name: str, output: Any) -> tuple[Rows, str, Tensor]:
    """A teacher's answers to a batch as the rows of a store, by the codec of its cache, else the default one."""
    cache, needs = trainer.teachers[name].config.cache, trainer._needs(name)
    exact = {key: value for key, value in fields_of(output).items() if key in needs or not key.startswith("maps.")}
    codec = "fp16" if cache is None else cache.codec
    codecs = {key: make_codec(codec, key, value, trainer._temperature(name)) for key, value in exact.items()}
    for key, one in codecs.items():
        one.settle(exact[key])
    rows = Rows(codecs)
    return rows, *rows.pack(exact)


def _lap(trainer: CanKDTrainer, part: Callable[[], object]) -> float:
    start = time.perf_counter()
    part()
    if trainer.args.device.type != "cpu":
        torch.accelerator.synchronize(trainer.args.device)
    return time.perf_counter() - start


def measure(trainer: CanKDTrainer, model: nn.Module, inputs: dict[str, Any]) -> Measured:
    """Times the parts of a step in turns: a first lap of each that warms up, then up to seven, for 15 seconds in all.

    Args:
        trainer: of one part of a run, which is not trained afterwards.
        model: what `ready` gave.
        inputs: what `ready` gave.
    """
    found = Measured(len(inputs["pixel_values"]), processes=trainer.args.world_size)
    step = _Step(trainer, model, inputs)
    parts = step.parts()
    first = _memory(trainer, parts, found)
    together = trainer.args.world_size > 1  # processes that wait for each other take equally many laps
    if sum(first.values()) * LEAST > LIMIT:
        logger.warning("measuring steps takes about %.0f seconds", sum(first.values()) * LEAST)
    found.answer = {name: content.shape[1] + BESIDE for name, (_, _, content) in step.rows.items()}
    begun = time.perf_counter()
    again = [name for name, seconds in first.items() if together or seconds <= LONG_LAP]
    found.seconds = {name: [] if name in again else [seconds] for name, seconds in first.items()}
    for lap in range(min(LEAST, MOST) if together else MOST):
        if not together and lap >= LEAST and time.perf_counter() - begun > LIMIT:
            break
        for name, part in parts.items():
            if name in again:
                found.seconds[name].append(_lap(trainer, part))
    model.zero_grad()
    found.seconds["read"], found.seconds["reread"] = _reading(trainer)
    _evaluation(trainer, found)
    return found


def _memory(trainer: CanKDTrainer, parts: Mapping[str, Callable[[], object]], found: Measured) -> dict[str, float]:
    """Bytes of a step with and without teachers; this also warms up. Returns the seconds of each part."""
    device, teachers, seconds = trainer.args.device, teacher_bytes(trainer), {}
    # Weight, gradient and AdamW's two moments in float32.
    state = {"alone": 16 * count(trainer.distiller.student), "live": 16 * count(trainer.distiller) + teachers}
    for name, part in parts.items():
        kept: dict[int, int] = {}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with kept_tensors(kept):
            seconds[name] = _lap(trainer, part)
        if name not in state:
            continue
        found.memory[name] = state[name] + without_weights(kept, trainer.distiller)
        if device.type == "cuda":
            unused = teachers if name == "alone" else 0
            found.memory[name] = torch.cuda.max_memory_allocated(device) - unused
    return seconds


def _reading(trainer: CanKDTrainer) -> tuple[list[float], list[float]]:
    """Seconds in which one process reads each of the first batches, and those for the same ones once more."""
    dataset: Any = trainer.train_dataset
    size = trainer.args.per_device_train_batch_size
    loader: Any = DataLoader(dataset, batch_size=size, collate_fn=trainer.data_collator)
    passes: list[list[float]] = []
    for most in (MOST + 1, None):
        batches, laps, begun = iter(loader), list[float](), time.perf_counter()
        for _ in range(most or len(passes[0])):
            start = time.perf_counter()
            if next(batches, None) is None:
                break
            laps.append(time.perf_counter() - start)
            if most and len(laps) > LEAST and time.perf_counter() - begun > LIMIT / 3:
                break
        passes.append(laps)
    return passes[0][1:] or passes[0], passes[1][1:] or passes[1]


def _evaluation(trainer: CanKDTrainer, found: Measured) -> None:
    """Seconds of evaluation batches: reading, forward, statistics."""
    dataset: Any = trainer.eval_dataset
    if dataset is None or not hasattr(dataset, "__len__") or not len(dataset):
        return
    size = min(len(dataset), trainer.args.eval_batch_size)
    part = Subset(dataset, range(size))
    laps: list[float] = []
    while len(laps) < min(3, MOST + 1) and (trainer.args.world_size > 1 or sum(laps) < LIMIT / 3):
        laps.append(_lap(trainer, lambda: trainer.evaluation_loop(trainer.get_eval_dataloader(part), "Evaluation")))
    found.seconds["evaluation"], found.evaluated = laps[1:] or laps, size
