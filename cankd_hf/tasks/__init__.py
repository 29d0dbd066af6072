"""The tasks, by the name a recipe calls them."""

from __future__ import annotations

from transformers import PreTrainedModel

from cankd_hf.errors import InputError
from cankd_hf.tasks.base import Task, TaskData
from cankd_hf.tasks.detection import DetectionTask
from cankd_hf.tasks.features import FeaturesTask
from cankd_hf.tasks.segmentation import SegmentationTask

TASKS: dict[str, type[Task]] = {
    "segmentation": SegmentationTask,
    "detection": DetectionTask,
    "features": FeaturesTask,
}

__all__ = ["TASKS", "DetectionTask", "FeaturesTask", "SegmentationTask", "Task", "TaskData", "task_for"]


def task_for(model: PreTrainedModel) -> Task:
    """The task a model is made for.

    Raises:
        InputError: if there is none.
    """
    for task in TASKS.values():
        if task.accepts(model):
            return task.from_model(model)
    raise InputError(
        f"model: expected a student for one of the tasks {list(TASKS)}, got {type(model).__name__}; "
        "take a model with a head for one of them, or pass `task=`"
    )
