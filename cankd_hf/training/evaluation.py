"""The evaluation methods of `CanKDTrainer`: statistics of each image instead of logits."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction
from transformers.trainer_pt_utils import nested_concat, nested_detach
from transformers.trainer_utils import EvalLoopOutput

from cankd_hf.config.advice import nearest
from cankd_hf.data.common.batch import META, Batch
from cankd_hf.errors import InputError
from cankd_hf.features.grids import logits_of
from cankd_hf.tasks import Task
from cankd_hf.training.base import TeachingTrainer
from cankd_hf.training.finite import StepGuard
from cankd_hf.training.output import DistillerOutput
from cankd_hf.training.streaming import is_ragged


@dataclass
class Details:
    """What an evaluation keeps beside the scores, exact for any number of processes.

    Attributes:
        statistics: of all images, [N, ...], in the order of the data set.
        tally: the sum of `Task.tally` over all images; None for a task without one.
    """

    statistics: Any = None
    tally: Tensor | None = None

    def add(self, counts: Tensor) -> None:
        """Adds the counts [B, ...] of a batch of all processes."""
        summed = counts.sum(0).cpu()
        self.tally = summed if self.tally is None else self.tally + summed


class TaskScores:
    """The `compute_metrics` of a trainer that is given none: the task's scores, from the statistics of all images."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.details: Details | None = None  # where the statistics are kept

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """`compute_result` is part of the Trainer's signature; the statistics always are of the whole data set."""
        found: Any = prediction.predictions
        # a list of one for each batch with eval_do_concat_batches=False
        one = isinstance(found, list)
        statistics = _joined([_statistics(batch) for batch in found]) if one else _statistics(found)
        if self.details is not None:
            self.details.statistics = statistics
        return self.task.scores(statistics)


class _Scored(tuple[Any, ...]):
    """Statistics and predictions of a batch or of all, for `predict`; a type that survives gathering and joining."""


def _statistics(found: Any) -> Any:
    return found[0] if isinstance(found, _Scored) else found


def _joined(batches: list[Any]) -> Any:
    """All batches in one: pairs of pairs, as one after the other would copy what is joined already each time."""
    while len(batches) > 1:
        batches = [reduce(nested_concat, batches[place : place + 2]) for place in range(0, len(batches), 2)]
    return batches[0]


def _predictions(found: Any) -> Any:
    return found[1] if isinstance(found, _Scored) else found


def _unpadded(tensor: Any, *args: Any, **kwargs: Any) -> Any:
    """For a single process, whose tensors have one size; accelerate would read it from the device."""
    return tensor


class EvaluationMixin(TeachingTrainer):
    """Methods of `CanKDTrainer` that replace those of `transformers.Trainer` in evaluation.

    `evaluate` keeps statistics of each image, not its logits. With a `compute_metrics` or
    `preprocess_logits_for_metrics` of the user, both get the student's outputs and the labels, as with the stock
    Trainer. `predict` returns the student's outputs and the labels, and the task's scores where there are labels.
    """

    guard: StepGuard
    _predicting = False
    _unlabelled = False
    _form: Any = None
    _details: Details | None = None

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.world_size == 1:
            self.accelerator.pad_across_processes = _unpadded

    @property
    def _own_metrics(self) -> bool:
        """Whether the user brings the metrics."""
        ours = self.compute_metrics is None or isinstance(self.compute_metrics, TaskScores)
        return not ours or self.preprocess_logits_for_metrics is not None

    @contextmanager
    def keeping_details(self) -> Iterator[Details]:
        """An evaluation inside of the context keeps what `Task.image_scores` and `Task.confusion` read."""
        details = Details()
        scores = self.compute_metrics
        self._details = details
        if isinstance(scores, TaskScores):
            scores.details = details
        try:
            yield details
        finally:
            self._details = None
            if isinstance(scores, TaskScores):
                scores.details = None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self._predicting = predicting = description == "Prediction"
        self._unlabelled, self._form, own = False, None, self._own_metrics
        settings: dict[str, Any] = {} if own else {"batch_eval_metrics": False, "include_for_metrics": []}
        if self.task.ragged_labels or not (own or predicting):
            # Joining the dicts of two batches would join the objects of two images. Statistics are joined at the end.
            settings["eval_do_concat_batches"] = False
        metrics = self.compute_metrics
        if own and isinstance(metrics, TaskScores):  # `preprocess_logits_for_metrics` alone: no metrics, as stock
            self.compute_metrics, prediction_loss_only = None, prediction_loss_only or not predicting
        self.gather_function = self._gather  # the Trainer puts its own back at the end
        try:
            with self._set_for_now(settings):
                output = super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                )
        finally:
            self.compute_metrics, self._predicting = metrics, False
        if not predicting or own:
            return output
        found: Any = output.predictions
        found = [_predictions(batch) for batch in found] if isinstance(found, list) else _predictions(found)
        return output._replace(predictions=found, label_ids=None if self._unlabelled else output.label_ids)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """An evaluation in training; raises InputError if it has no score called `metric_for_best_model`."""
        name = (self.args.metric_for_best_model or "").removeprefix("eval_")
        try:
            metrics: dict[str, float] = super()._evaluate(*args, **kwargs)
        except KeyError as error:
            if "metric_for_best_model" not in str(error):
                raise
            metrics = self.state.log_history[-1]
        if name and f"eval_{name}" not in metrics:
            times = ("runtime", "per_second", "preparation_time")
            known = [key.removeprefix("eval_") for key in metrics if key.startswith("eval_")]
            hint = nearest(name, [key for key in known if not key.endswith(times)])
            raise InputError(f"training.metric_for_best_model: no evaluation has a score {name!r}; {hint}")
        return metrics

    def _gather(self, data: Any) -> Any:
        """What all processes have, without the images that only fill up the last batch.

        Those are cut off each tensor; of labels that are a list with a dict for each image, off the list.
        """
        if isinstance(data, _Scored):
            return _Scored(map(self._gather, data))
        objects = is_ragged(data) or (self.args.eval_use_gather_object and self._own_metrics)
        return self.accelerator.gather_for_metrics(data, use_gather_object=objects)

    @contextmanager
    def _set_for_now(self, settings: Mapping[str, Any]) -> Iterator[None]:
        before = {key: getattr(self.args, key) for key in settings}
        vars(self.args).update(settings)
        try:
            yield
        finally:
            vars(self.args).update(before)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """The loss, what is kept of the outputs, and the labels of a batch.

        Raises:
            InputError: if the task's scores are asked for and the batch has no labels.
        """
        batch = Batch(self._prepare_inputs(inputs))
        kept = self.task.model_inputs(batch.inputs)
        learns = self.task.needs_teacher_in_evaluation
        with torch.no_grad(), self.compute_loss_context_manager():
            if learns or (self.label_names and all(kept.get(name) is not None for name in self.label_names)):
                count = self._get_num_items_in_batch([kept], self.args.device)
                loss, outputs = self.compute_loss(model, Batch({**kept, META: batch.meta}), True, count)
                loss = None if loss is None else loss.detach().mean()
            else:
                loss, outputs = None, model(**kept)
        self.guard.see_answers(outputs)
        if prediction_loss_only:
            return loss, None, None
        given = [batch.get(name) for name in self.label_names]
        labels: Any = None
        if given and all(label is not None for label in given):
            labels = nested_detach(tuple(given) if len(given) > 1 else given[0])
        if self._own_metrics:
            return loss, self._own_outputs(outputs, ignore_keys, labels), labels
        scored = learns or batch.get("labels") is not None
        if not (scored or self._predicting):
            raise InputError(
                "eval_dataset: expected images with labels to score, got a batch without; leave those images out, or "
                "call predict"
            )
        predictions = self._own_outputs(outputs, ignore_keys, labels) if self._predicting else None
        if not scored:
            return loss, predictions, labels
        with torch.no_grad():
            statistics = self.task.statistics(_as_ours(outputs), batch.inputs, self.student)
            if self._details is not None and (counts := self.task.tally(_as_ours(outputs), batch.inputs)) is not None:
                self._details.add(self.gather_function(counts))
        self._unlabelled = labels is None
        # The Trainer computes metrics only if there are labels; the statistics already include them.
        mark = torch.zeros(len(batch["pixel_values"]), device=self.args.device)
        if not self._predicting:
            return loss, statistics, mark
        return loss, _Scored((statistics, predictions)), mark if labels is None else labels

    def _own_outputs(self, outputs: Any, ignore_keys: list[str] | None, labels: Any) -> Any:
        """The student's outputs without its loss, as the stock Trainer returns them."""
        if ignore_keys is None:
            ignore_keys = getattr(self.student.config, "keys_to_ignore_at_inference", [])
        own = outputs["outputs"] if isinstance(outputs, DistillerOutput) else outputs
        if isinstance(own, Mapping):
            found = tuple(value for key, value in own.items() if key not in [*ignore_keys, "loss"])
        else:  # what a `compute_loss` of the user returns
            found = tuple(own[1:])
        self._check_form(found, labels)
        return nested_detach(found if len(found) > 1 else found[0])

    def _check_form(self, predictions: tuple[Any, ...], labels: Any) -> None:
        """Refuses batches that the Trainer could not join to one array, after its first batch."""
        if self.preprocess_logits_for_metrics is not None or not self.args.eval_do_concat_batches:
            return
        form = labels is None, [value.shape[2:] for value in (*predictions, labels) if isinstance(value, Tensor)]
        if self._form not in (None, form):
            raise InputError(
                "eval_do_concat_batches: the predictions of all images are joined, but images differ in size, or only "
                "some have labels; set it to False for a list of batches, or give all images one size"
            )
        self._form = form


def _as_ours(outputs: Any) -> Any:
    """What `Task.statistics` reads, also where a `compute_loss` of the user returns the student's own output."""
    return (
        outputs
        if isinstance(outputs, DistillerOutput)
        else DistillerOutput(logits=logits_of(outputs), outputs=outputs)
    )
