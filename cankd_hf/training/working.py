"""Measures on a few held-out images, while a distillation trains, whether it works."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager
from statistics import fmean
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cankd_hf.data.common.batch import Batch
from cankd_hf.data.common.seeds import seeded
from cankd_hf.tasks.pictures import sample_evenly
from cankd_hf.training.base import TeachingTrainer
from cankd_hf.training.conflict import told
from cankd_hf.training.distiller import Distiller
from cankd_hf.training.monitoring.probe import cells, knn_accuracy
from cankd_hf.training.monitoring.working import CKA, CORRELATION, LOSS, PLAIN, PROBE, Verdict, judge
from cankd_hf.training.output import DistillerOutput
from cankd_hf.training.placing import reads

logger = logging.getLogger(__name__)

SHARE = 0.01  # of the images that a process trains on: how many may be measured in the whole run
MEASUREMENTS = 3, 20  # least and most in a run, its start among them
LEAST_STEPS = 10  # of a run that is judged
PROBED = 200  # labelled images, at most, of which a probe knows one half and is asked about the other
LEAST_PROBED = 20
NO_LABEL = -100


class WorkingCallback(TrainerCallback):
    """Measures a distillation on held-out images, and says in a line whether it works: when that changes, and at the
    end.

    The images are the same each time, spread over the (first) evaluation set; each process measures all of them, so
    that none waits. Measured are the losses, once as they are and once with their learned branch off, the raw
    similarity of the maps, and without a task loss a kNN probe, where there are labels. All are logged as `held_...`.
    Training is not affected: modes, BatchNorm statistics and random state stay as they were.

    An image measured costs at most what one costs that is trained on (no backward pass). Therefore the images of all
    measurements are 1% of those that are trained on; in runs of fewer than 600 images, 3 measurements of 2 images.

    Args:
        trainer: a `CanKDTrainer`; the caller adds the callback to it.
    """

    def __init__(self, trainer: TeachingTrainer) -> None:
        self.trainer = trainer
        self.reason = ""  # why nothing is measured
        self.says_the_end = True  # not where the command says it below its table
        self._due: set[int] = set()
        self._batches: list[Batch] = []
        self._probed: list[tuple[Batch, Tensor]] = []
        self._said: str | None = None

    def verdict(self) -> Verdict:
        """The verdict on the present training."""
        task, findings = self.trainer.task, cast(Any, self.trainer).health.findings
        history = self.trainer.state.log_history
        return judge(history, findings, task.metric, task.greater_is_better, self.reason)

    def facts(self) -> dict[str, Any]:
        """The verdict as plain data, and what became of watched terms; empty without a teacher."""
        if not self.trainer.teachers:
            return {}
        weights = told(self.trainer.state.log_history)
        return {**self.verdict().facts(), **({"weights": weights} if weights else {})}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._due, self._batches, self._probed, self._said = set(), [], [], None
        self.reason = self._why_not(state)
        if self.reason:
            logger.info("not judged whether it works: %s", self.reason)
            return
        trained = state.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps
        budget, most = int(SHARE * trained), cast(Any, args).check_images
        probed = LEAST_PROBED if self._labelled() is not None else 0
        times = min(max(budget // (most + probed), MEASUREMENTS[0]), MEASUREMENTS[1])
        # Not after the last step that asks a teacher: it would be asked for this alone.
        taught = self.trainer.distiller.objective.taught(state.max_steps)
        self._due = {round(index * taught / (times - 1)) for index in range(times)}
        images = min(max(budget // times, 2), most)
        with seeded(args.seed):
            dataset = _first(self.trainer.eval_dataset)
            self._batches = [batch for batch, _ in self._collated(sample_evenly(dataset, images))]
            self._prepare_probe(budget // times - images)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == 0:  # before the first step, when all callbacks have begun
            self._look(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._look(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._batches, self._probed = [], []
        verdict = self.verdict()
        if state.is_world_process_zero and verdict.kind is not None and self.says_the_end:
            logger.warning("Is it working? %s", verdict.line)

    def _why_not(self, state: TrainerState) -> str:
        trainer: Any = self.trainer
        dataset = _first(trainer.eval_dataset)
        reasons = {
            "training.check_images is 0": trainer.args.check_images == 0,
            f"a run of {state.max_steps} steps is too short": state.max_steps < LEAST_STEPS,
            "there is no evaluation set": dataset is None,
            "the evaluation set has one image": isinstance(dataset, Sized) and len(dataset) < 2,
            "the evaluation set is a stream, whose first images would be read again each time": (
                isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__")
            ),
            "FSDP or DeepSpeed shards the weights": trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled,
            "no distillation loss counts": not any(term.counts for term in trainer.distiller.objective.terms),
            "its losses compare nothing in images with labels": all(
                reads(term) == "boxes" for term in trainer.distiller.objective.terms
            ),
        }
        return next((reason for reason, holds in reasons.items() if holds), "")

    def _collated(self, samples: list[Any]) -> list[tuple[Batch, list[Any]]]:
        """Batches of an evaluation, still on the CPU, with their samples."""
        count, collate = len(samples), cast(Any, self.trainer).taught_collator
        size = self.trainer.args.eval_batch_size
        starts = list(range(0, count - (size > 1), size))  # no last one of a single image, which has no statistics
        parts = [samples[start:end] for start, end in zip(starts, [*starts[1:], count], strict=True)]
        return [(cast(Batch, collate(part)), part) for part in parts]

    def _look(self, state: TrainerState) -> None:
        """Measures and logs if it is time, and says what has changed."""
        if state.global_step not in self._due:
            return
        self._due.discard(state.global_step)
        due = self.trainer.control.should_log
        self.trainer.log(self._measured())
        self.trainer.control.should_log = due  # else the step's own line would be taken as written
        verdict = self.verdict()
        if verdict.kind != self._said and state.global_step < state.max_steps:  # else it is said at the end
            self._said = verdict.kind
            if state.is_world_process_zero:
                logger.warning("Is it working? Step %d: %s", state.global_step, verdict.line)

    @torch.no_grad()
    def _measured(self) -> dict[str, float]:
        trainer = self.trainer
        found: list[dict[str, float]] = []
        with ExitStack() as stack:
            stack.enter_context(seeded(trainer.args.seed))
            stack.enter_context(watched(trainer.distiller))
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # nothing is compiled for a few images
            stack.enter_context(trainer.compute_loss_context_manager())
            for collated in self._batches:
                batch = self._on_device(collated)
                found.append(self._values(self._outputs(batch), len(batch["pixel_values"])))
            probe = self._probe()
        names = dict.fromkeys(name for values in found for name in values)
        total = sum(values["images"] for values in found)
        means = {name: sum(one[name] * one["images"] for one in found) / total for name in names if name != "images"}
        return {name: value for name, value in {**means, PROBE: probe}.items() if math.isfinite(value)}

    def _on_device(self, batch: Batch) -> Batch:
        return Batch(self.trainer._prepare_inputs(batch.to(self.trainer.args.device)))

    def _outputs(self, batch: Batch) -> DistillerOutput:
        trainer: Any = self.trainer
        factors = [1.0 if term.counts else 0.0 for term in trainer.distiller.objective.terms]
        given = trainer._ask_teachers(batch, factors, True)
        inputs = trainer.task.model_inputs(batch.inputs)
        labels = inputs.pop("labels", None)
        return cast(DistillerOutput, trainer.distiller(**inputs, **given, meta=batch.meta, targets=labels, keep=False))

    def _values(self, outputs: DistillerOutput, images: int) -> dict[str, float]:
        """The measurements of a batch: losses with the weights of their pairs, without schedules and shares."""
        distiller = self.trainer.distiller
        parts, plain = outputs.parts or {}, outputs.plain or {}
        weights = {item.name: item.weight for item in distiller.placed if item.name in parts}
        similarity = {name: float(value.mean()) for name, value in (outputs.similarity or {}).items()}
        # After a learned connector it would be the connector's too.
        own = [name for name, connector in distiller.connectors.items() if not list(connector.parameters())]
        similar = {
            CKA: [value for name, value in similarity.items() if name.startswith("cka/")],
            CORRELATION: [similarity[name] for pair in own if (name := f"correlation/{pair}") in similarity],
        }
        values = {LOSS: sum(weight * float(parts[name]) for name, weight in weights.items())}
        if plain:
            values[PLAIN] = sum(weight * float(plain.get(name, parts[name])) for name, weight in weights.items())
        return {**values, **{name: fmean(found) for name, found in similar.items() if found}, "images": images}

    # The probe

    def _labelled(self) -> Any:
        """A set with labels, of a run without a task loss; None without."""
        distiller = self.trainer.distiller
        if distiller.objective.task_weight > 0 or distiller.taps is None:
            return None
        dataset = self.trainer.probe_dataset
        dataset = _first(self.trainer.eval_dataset) if dataset is None else dataset
        sample = dataset[0]
        return dataset if isinstance(sample, Mapping) and _label(sample) is not None else None

    def _prepare_probe(self, budget: int) -> None:
        dataset, count = self._labelled(), min(PROBED, budget)
        if dataset is None or count < LEAST_PROBED or len(dataset) < LEAST_PROBED:
            return
        for batch, samples in self._collated(sample_evenly(dataset, count)):
            size = tuple(batch["pixel_values"].shape[-2:])
            labels = [_placed(sample, size) for sample in samples]
            self._probed.append((batch, torch.stack(labels)))

    def _probe(self) -> float:
        """The accuracy on every other image; nan without labels."""
        if not self._probed:
            return math.nan
        taps: Any = self.trainer.distiller.taps
        sides: tuple[list[Any], list[Any]] = ([], [])
        for collated, labels in self._probed:
            pixels = self._on_device(collated)["pixel_values"]
            feature_map = taps.run(pixels, **taps.forward_kwargs)[-1]
            for side, place in zip(sides, (slice(0, None, 2), slice(1, None, 2)), strict=True):
                if len(feature_map[place]):
                    side.append(cells(feature_map[place], labels.to(pixels.device)[place]))
        known, asked = (tuple(torch.cat(part) for part in zip(*side, strict=True)) for side in sides)
        return knn_accuracy(cast(Any, known), cast(Any, asked), (self.trainer.task.ignore_index, NO_LABEL))


@contextmanager
def watched(distiller: Distiller) -> Iterator[None]:
    """Eval mode, but BatchNorms that train take the statistics of their batch, and keep none of it.

    Running statistics approach those of the images even where no weight of the student moves, and its maps with them.
    """
    modes = [(module, module.training) for module in distiller.modules()]
    distiller.train()
    norms = [part for part in distiller.student.modules() if isinstance(part, _BatchNorm) and part.training]
    kept = [norm.track_running_stats for norm in norms]
    distiller.eval()
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm, tracks in zip(norms, kept, strict=True):
            norm.track_running_stats = tracks
        for module, training in modes:
            module.training = training


def _first(dataset: Any) -> Any:
    """Of several evaluation sets the first."""
    return next(iter(dataset.values()), None) if isinstance(dataset, dict) else dataset


def _label(sample: Mapping[str, Any]) -> Tensor | None:
    """The class [] or the mask [H, W] of a sample; None where it has another kind of label, or none."""
    label = sample.get("labels")
    if isinstance(label, dict) or label is None:
        return None
    found = torch.as_tensor(label)
    return found.long() if found.ndim in (0, 2) else None


def _placed(sample: Mapping[str, Any], size: tuple[int, int]) -> Tensor:
    """The class, or the mask as large as its image and, like it, padded to the size of the batch."""
    label = cast(Tensor, _label(sample))
    if label.ndim == 0:
        return label
    height, width = sample["pixel_values"].shape[-2:]
    mask = F.interpolate(label[None, None].float(), size=(height, width), mode="nearest-exact")[0, 0].long()
    return F.pad(mask, (0, size[1] - width, 0, size[0] - height), value=NO_LABEL)
