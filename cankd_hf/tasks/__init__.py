"""The tasks, by their names in a recipe."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from cankd_hf.config.named import check_named, hint
from cankd_hf.data.common.sources import TaskData
from cankd_hf.errors import InputError
from cankd_hf.names import FACTS_FILE
from cankd_hf.tasks.base import Metric, Task
from cankd_hf.tasks.classification import ClassificationTask
from cankd_hf.tasks.depth import DepthTask
from cankd_hf.tasks.detection import DetectionTask
from cankd_hf.tasks.features import FeaturesTask
from cankd_hf.tasks.instances import InstanceSegmentationTask
from cankd_hf.tasks.segmentation import SegmentationTask

TASKS: dict[str, type[Task]] = {
    "segmentation": SegmentationTask,
    "detection": DetectionTask,
    "instance-segmentation": InstanceSegmentationTask,
    "depth": DepthTask,
    "classification": ClassificationTask,
    "features": FeaturesTask,
}

__all__ = [
    "TASKS",
    "ClassificationTask",
    "DepthTask",
    "DetectionTask",
    "FeaturesTask",
    "InstanceSegmentationTask",
    "Metric",
    "SegmentationTask",
    "Task",
    "TaskData",
    "recorded_task",
    "saved_task",
    "task_for",
]


def task_for(model: PreTrainedModel) -> Task:
    """The task of a model. Raises InputError if there is none."""
    # The nearest class decides: one that finds objects and their masks is derived from one that finds objects.
    nearest = [task for kind in type(model).__mro__ for task in TASKS.values() if task.recognises(kind.__name__)]
    for task in [*nearest, *TASKS.values()]:
        if task.accepts(model):
            return task.from_model(model)
    raise InputError(
        f"model: expected a student for one of the tasks {list(TASKS)}, got {type(model).__name__}; "
        "take a model with a head for one of them, or pass `task=`"
    )


def saved_task(checkpoint: str) -> type[Task]:
    """The task of a saved student (a folder or Hub id), by the class that its config.json names.

    Raises:
        InputError: if there is no student, or one of no task.
    """
    check_named(checkpoint, checkpoint, "a saved student")
    place = Path(checkpoint)
    if place.is_dir() and not (place / "config.json").is_file():
        raise InputError(f"{checkpoint}: expected a saved student, found no config.json; name a run or a checkpoint-N")
    try:
        config = PretrainedConfig.get_config_dict(checkpoint)[0]
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())[:300]
        raise InputError(f"{checkpoint}: expected a saved student, found none{hint(checkpoint)}: {said}") from error
    names = config.get("architectures") or ["no class"]
    # A subclass of the user's is known by the Auto class of its base, or by what its trainer recorded.
    known = [names[0], *(config.get("auto_map") or {})]
    found = next((task for name in known for task in TASKS.values() if task.recognises(name)), None)
    if found is None and (place / FACTS_FILE).is_file():
        found = _recorded(place / FACTS_FILE)
    if found is None:
        raise InputError(f"{checkpoint}: expected a student of one of the tasks {list(TASKS)}, got {names[0]!r}")
    return found


def _recorded(file: Path) -> type[Task] | None:
    """The task in a file of facts beside a student."""
    try:
        return TASKS.get(json.loads(file.read_text(encoding="utf-8"))["task"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file}: expected the facts of a training, got none ({error}); save the student again"
        ) from error


def recorded_task(run: Mapping[str, Any], config: Mapping[str, Any]) -> type[Task]:
    """The task of a student by what its trainer recorded and its config.json; by default that of a bare backbone."""
    architecture = (config.get("architectures") or [""])[0]
    by_tag = [task for task in TASKS.values() if task.pipeline_tag == run.get("pipeline_tag")]
    by_class = [task for task in TASKS.values() if task.recognises(architecture)]
    return TASKS.get(str(run.get("task"))) or (by_tag + by_class + [FeaturesTask])[0]
