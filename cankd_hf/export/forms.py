"""The forms of a student and its teachers side by side: their scores, and how far each is from PyTorch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from cankd_hf.errors import InputError
from cankd_hf.export.compare import pictures
from cankd_hf.export.files import Runner, one_line
from cankd_hf.export.images import Images
from cankd_hf.export.source import Source
from cankd_hf.export.teachers import Known
from cankd_hf.features.grids import logits_of
from cankd_hf.metrics.detection import PADDING
from cankd_hf.tasks.export_forms import Agreement, ExportForm

UNSCORED = 4  # noise images that forms are compared on where no data are read


@dataclass
class Form:
    """One row of the table."""

    name: str
    run: Callable[[Tensor], Any]  # what is timed
    output: Callable[[Any], Any] | None = None  # what `run` gives -> the output of a model; None: it is not scored
    plain: Callable[[Any], Sequence[Tensor]] | None = None  # what `run` gives -> the outputs of the student's form
    model: PreTrainedModel | None = None  # whose config the task's statistics read; None: the student
    facts: dict[str, Any] = field(default_factory=dict)  # for the report
    statistics: list[Tensor] = field(default_factory=list)
    agreement: Agreement = field(default_factory=Agreement)


def student_form(source: Source, form: ExportForm) -> Form:
    """The student in PyTorch."""
    return Form("student, PyTorch", lambda images: source.model(pixel_values=images), lambda out: out, form.read)


def file_form(name: str, runner: Runner, form: ExportForm) -> Form:
    """A file."""
    return Form(name, runner, form.as_output, lambda out: out)


def teacher_form(teacher: Known) -> Form:
    """A teacher in PyTorch."""
    output = None if teacher.unscored is not None else lambda out: out
    model = teacher.model if isinstance(teacher.model, PreTrainedModel) else None
    return Form(f"{teacher.name}, PyTorch", teacher.run, output, model=model)


@torch.no_grad()
def score(source: Source, form: ExportForm, forms: list[Form], images: Images | None, size: tuple[int, int]) -> None:
    """Runs all forms on the same images, and adds scores and distances to `facts` of each.

    Args:
        source: the student.
        form: its exportable form.
        forms: the student in PyTorch is the first one.
        images: to score on; None: only distances, on noise of this `size`.

    Raises:
        InputError: if the images cannot be scored by a form of the student.
    """
    labelled = images is not None and images.task.takes_labels
    count = 0
    for batch in images.batches() if images is not None else _noise(size):
        count += 1
        wanted: Sequence[Tensor] | None = None
        for one in forms:
            if one.plain is None and (one.output is None or not labelled):
                continue
            found = _run(one, batch["pixel_values"])
            if found is None:
                continue
            if images is not None and labelled and one.output is not None:
                output = one.output(found)
                known = {"logits": logits_of(output), "outputs": output}
                statistics: Any = images.task.statistics(known, batch, one.model or source.model)
                one.statistics.append(statistics[0])
            if one.plain is not None:
                plain = one.plain(found)
                wanted = plain if wanted is None else wanted
                one.agreement += form.agreement(wanted, plain)
    if count == 0:
        raise InputError("data: expected images to score on, found none")
    for one in forms:
        _close(one, images if labelled else None, form, one is forms[0])
    forms[0].facts["images"] = count


def _run(form: Form, pixels: Tensor) -> Any:
    """What a form gives for an image; None, from then on, for a teacher that does not take it."""
    try:
        return form.run(pixels)
    except Exception as error:  # whatever the runtime or the model raises
        problem = f"{form.name}: fails for an image of {pixels.shape[-2]} x {pixels.shape[-1]}: {one_line(error)}"
        if form.plain is not None:
            raise InputError(f"{problem}; give all images one size with data.image_size") from error
        form.output, form.statistics, form.facts["unscored"] = None, [], problem
        return None


def _close(one: Form, images: Images | None, form: ExportForm, reference: bool) -> None:
    """Scores from statistics, and means from sums."""
    if images is not None and one.statistics:
        table = pad_sequence(one.statistics, batch_first=True, padding_value=PADDING)
        one.facts["scores"] = images.task.scores(table.numpy())
        one.statistics = []
    apart = one.agreement
    if one.plain is not None and not reference:
        one.facts |= {
            "largest_error": apart.largest,
            "mean_error": apart.total / max(apart.values, 1),
            "equal": apart.equal / apart.parts if apart.parts else None,
            "equal_of": form.equal_name,
        }


def _noise(size: tuple[int, int]) -> Iterator[dict[str, Tensor]]:
    for image in pictures(UNSCORED, *size):
        yield {"pixel_values": image[None]}
