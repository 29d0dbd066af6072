"""The tasks, by the name a recipe calls them."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES

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

__all__ = ["TASKS", "DetectionTask", "FeaturesTask", "SegmentationTask", "Task", "TaskData", "saved_task", "task_for"]


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


def saved_task(checkpoint: str) -> type[Task]:
    """The task of a saved student, by the class that its config.json names.

    Args:
        checkpoint: folder or Hub id.

    Raises:
        InputError: if there is no student, or one of no task.
    """
    place = Path(checkpoint)
    if place.is_dir() and not (place / "config.json").is_file():
        raise InputError(f"{checkpoint}: expected a saved student, found no config.json; name a run or a checkpoint-N")
    try:
        names = PretrainedConfig.get_config_dict(checkpoint)[0].get("architectures") or ["no class"]
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())[:300]
        raise InputError(f"{checkpoint}: expected a saved student, found none: {said}") from error
    if names[0].endswith("ForObjectDetection"):
        return DetectionTask
    if "SemanticSegmentation" in names[0]:
        return SegmentationTask
    if names[0] in MODEL_FOR_BACKBONE_MAPPING_NAMES.values():
        return FeaturesTask
    raise InputError(f"{checkpoint}: expected a segmentation or detection student or a backbone, got {names[0]!r}")
