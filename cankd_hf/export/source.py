"""What is exported: a saved student, how it wants its images, and what the run that made it says."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from cankd_hf.errors import InputError
from cankd_hf.hub.files import read_json
from cankd_hf.tasks import TASKS, Task, saved_task
from cankd_hf.tasks.export_forms import ExportForm

DEFAULT_SIZE = (512, 512)


@dataclass
class Source:
    """A student to export.

    Args:
        name: folder or Hub id.
        task: name of what it does.
        model: in eval mode and float32.
        preprocessor: fields of its preprocessor_config.json, empty where there is none.
    """

    name: str
    task: str
    model: PreTrainedModel
    preprocessor: dict[str, Any] = field(default_factory=dict)

    @property
    def classes(self) -> list[str]:
        """Names in the order of the outputs, where the task has classes."""
        return list(self.kind.from_model(self.model).id2label.values())

    @property
    def kind(self) -> type[Task]:
        """What it does."""
        return TASKS[self.task]

    def form(self) -> ExportForm:
        """What of it is exported."""
        return self.kind.export_form(self.model, self.size())

    def size(self) -> tuple[int, int]:
        """Height and width that the preprocessor brings images to."""
        given = self.preprocessor.get("size") or {}
        height = given.get("height") or given.get("shortest_edge")
        width = given.get("width") or given.get("longest_edge") or height
        return (int(height), int(width)) if height and width else DEFAULT_SIZE


def load(checkpoint: str) -> Source:
    """Loads a student with everything that says how to feed it.

    Raises:
        InputError: if there is none.
    """
    task = saved_task(checkpoint)
    reason = task.why_not_exported(PretrainedConfig.get_config_dict(checkpoint)[0])
    if reason is not None:
        raise InputError(f"{checkpoint}: {reason}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = task.load(checkpoint)
    return Source(checkpoint, task.name, model.eval().requires_grad_(False), _preprocessor(checkpoint))


def _preprocessor(checkpoint: str) -> dict[str, Any]:
    if Path(checkpoint).is_dir():
        return read_json(Path(checkpoint) / "preprocessor_config.json")
    from transformers.utils import cached_file

    file = cached_file(checkpoint, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    return {} if file is None else read_json(Path(file))


def teacher_of(source: Source) -> tuple[Source | None, dict[str, Any]]:
    """The teacher of the run, if it lies on this machine and is of the same task, and what results.json says of it."""
    folder = Path(source.name)
    if not folder.is_dir():
        return None, {}
    root = folder if (folder / "results.json").is_file() else folder.parent
    arms = read_json(root / "results.json").get("arms", [])
    facts: dict[str, Any] = next((arm for arm in arms if arm.get("name") == "teacher"), {})
    recorded = (read_json(folder / "distillation.json").get("teacher") or {}).get("model")
    for place in (root / "teacher", recorded, facts.get("folder")):
        if place and Path(place).is_dir() and Path(place).resolve() != folder.resolve():
            try:
                found = load(str(place))
            except InputError:
                continue
            if found.task == source.task:
                return found, facts
    return None, facts
