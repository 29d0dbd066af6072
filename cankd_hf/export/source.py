"""A saved student to export, with its preprocessor, and where images for it come from."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from cankd_hf.errors import InputError
from cankd_hf.hub.files import read_json
from cankd_hf.models.finite import named, not_finite
from cankd_hf.tasks import TASKS, saved_task
from cankd_hf.tasks.export_forms import ExportForm

DEFAULT_SIZE = (512, 512)


@dataclass
class Source:
    """A student to export."""

    name: str  # folder or Hub id
    task: str
    model: PreTrainedModel  # in eval mode and float32
    preprocessor: dict[str, Any] = field(default_factory=dict)  # of preprocessor_config.json; empty without the file

    @property
    def classes(self) -> list[str]:
        """Class names in the order of the outputs; empty for a task without classes."""
        return list(TASKS[self.task].from_model(self.model).id2label.values())

    def form(self) -> ExportForm:
        """Its exportable form."""
        return TASKS[self.task].export_form(self.model, self.size())

    def size(self) -> tuple[int, int]:
        """Height and width that the preprocessor resizes images to."""
        given = self.preprocessor.get("size") or {}
        height = given.get("height") or given.get("shortest_edge")
        width = given.get("width") or given.get("longest_edge") or height
        return (int(height), int(width)) if height and width else DEFAULT_SIZE


def load(checkpoint: str) -> Source:
    """Loads a student and its preprocessor. Raises InputError if there is none, or it cannot be exported."""
    task = saved_task(checkpoint)
    reason = task.why_not_exported(PretrainedConfig.get_config_dict(checkpoint)[0])
    if reason is not None:
        raise InputError(f"{checkpoint}: {reason}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = task.load(checkpoint)
    if wrong := not_finite(model.state_dict()):
        raise InputError(f"{checkpoint}: expected finite weights to export, got {named(wrong)}")
    file = cached_file(checkpoint, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    fields = {} if file is None else read_json(Path(file))
    return Source(checkpoint, task.name, model.eval().requires_grad_(False), fields)
