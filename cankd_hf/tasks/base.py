"""What a task is: one object that knows its data, its student, its metric, and nothing of distillation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedModel

from cankd_hf.config.data import DataConfig
from cankd_hf.config.student import StudentConfig
from cankd_hf.data.common.sources import ROLES


@dataclass
class TaskData:
    """The splits of one data set, ready for the Trainer, and facts about them for tables and cards."""

    train: Any
    eval: Any
    test: Any
    facts: dict[str, Any] = field(default_factory=dict)


class Task(ABC):
    """One kind of learning: the trainer asks it for all that depends on the kind. CONTRIBUTING says how to add one."""

    name: ClassVar[str]
    metric: ClassVar[str]
    """Name of the score that picks the best checkpoint and fills the result table; higher is better, in 0..1."""
    pipeline_tag: str
    """The Hub's name of what the student does; one task's students may do it in several ways."""
    needs_teacher_in_evaluation: ClassVar[bool] = False
    """Whether evaluation compares the student's maps with the teacher's, so that the teacher runs in it."""

    @classmethod
    @abstractmethod
    def accepts(cls, model: PreTrainedModel) -> bool:
        """Whether a student of this class is trained by this task."""

    @classmethod
    @abstractmethod
    def from_model(cls, model: PreTrainedModel) -> Task:
        """The task as the model's config describes it, for use without a recipe."""

    @classmethod
    @abstractmethod
    def from_data(
        cls, config: DataConfig, labelled: bool = True, splits: Sequence[str] = ROLES
    ) -> tuple[Task, TaskData]:
        """Loads and checks the data set and makes the task that fits it.

        Args:
            config: where the data are and how to read them.
            labelled: whether labels are needed.
            splits: which of train, eval and test to load.

        Raises:
            InputError: for data that cannot be used.
        """

    @abstractmethod
    def build_student(self, config: StudentConfig) -> PreTrainedModel:
        """The student with a head that fits the data."""

    @abstractmethod
    def load(self, folder: str | Path, revision: str | None = None) -> PreTrainedModel:
        """A saved student of this task, from a folder or the Hub, in float32."""

    @abstractmethod
    def image_processor(self, config: DataConfig) -> BaseImageProcessor:
        """Preprocessing as in evaluation, saved beside the student."""

    @abstractmethod
    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Samples -> one batch."""

    def model_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The part of an evaluation batch that the model's forward takes."""
        return dict(inputs)

    @abstractmethod
    def statistics(
        self, outputs: Mapping[str, Any], inputs: Mapping[str, Any], student: PreTrainedModel
    ) -> Tensor | dict[str, Tensor]:
        """What the scores need of each image, [B, ...]; small, so that a whole validation set fits in memory.

        Args:
            outputs: of the `Distiller`: `logits`, the student's own `outputs`, `similarity` where it is measured.
            inputs: of the batch.
            student: the model.
        """

    @abstractmethod
    def scores(self, statistics: Any) -> dict[str, float]:
        """All images' statistics, as arrays [N, ...], -> scores, exact whatever the number of processes."""

    def picture(self, data: Any, models: Mapping[str, PreTrainedModel], file: Path, config: DataConfig) -> bool:
        """Draws what a person would look at first. Returns whether there is something to draw."""
        return False
