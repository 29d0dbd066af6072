"""What a task is: one object that knows all of its kind, and nothing of distillation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedModel

from cankd_hf.config.data import DataConfig
from cankd_hf.config.student import StudentConfig
from cankd_hf.data.common.dataset import Transform
from cankd_hf.data.common.sources import ROLES, TaskData
from cankd_hf.errors import InputError
from cankd_hf.tasks.export_forms import ExportForm


class Metric(NamedTuple):
    """What a score is called.

    Attributes:
        hub: by the Hub, as the type of a metric.
        title: in the tables of a card.
        short: in a sentence.
    """

    hub: str
    title: str
    short: str = ""


def stretched(config: DataConfig) -> dict[str, Any]:
    """Settings of an image processor that resizes as evaluation does, without regard to aspect, and normalises."""
    size = config.image_size
    return {
        "do_resize": size is not None,
        "size": {"height": size[0], "width": size[1]} if size is not None else None,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
    }


class Task(ABC):
    """One kind of learning: all that depends on the kind is asked of it. CONTRIBUTING says how to add one."""

    name: ClassVar[str]
    metric: ClassVar[str]
    """Name of the score that picks the best checkpoint and fills the result table."""
    greater_is_better: ClassVar[bool] = True
    """The direction of `metric`."""
    metrics: ClassVar[Mapping[str, Metric]]
    """The scores that tables and cards show, in their order; `metric` among them."""
    pipeline_tag: str
    """The Hub's name of what the student does; one task's students may do it in several ways."""
    needs_teacher_in_evaluation: ClassVar[bool] = False
    """Whether evaluation compares the student's maps with the teacher's, so that the teacher runs in it."""
    id2label: dict[int, str] = {}
    """Names of the classes; empty for a task without classes."""

    # Models

    @classmethod
    @abstractmethod
    def recognises(cls, architecture: str) -> bool:
        """Whether a saved model of this class name is a student of this task."""

    @classmethod
    def accepts(cls, model: PreTrainedModel) -> bool:
        """Whether a student of this class is trained by this task."""
        return cls.recognises(type(model).__name__)

    @classmethod
    @abstractmethod
    def from_model(cls, model: PreTrainedModel) -> Task:
        """The task as the model's config describes it, for use without a recipe."""

    def for_model(self, model: PreTrainedModel) -> Task:
        """The task with what this very model needs of its batches and its image processor."""
        return self

    @abstractmethod
    def build_student(self, config: StudentConfig) -> PreTrainedModel:
        """The student with a head that fits the data."""

    @classmethod
    @abstractmethod
    def load(cls, folder: str | Path, revision: str | None = None) -> PreTrainedModel:
        """A saved student of this task, from a folder or the Hub, in float32."""

    @abstractmethod
    def image_processor(self, config: DataConfig) -> BaseImageProcessor:
        """Preprocessing as in evaluation, saved beside the student."""

    # Data

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

    @classmethod
    def check_labelled(cls, labelled: bool) -> None:
        """Refuses to train a head without labels."""
        if not labelled:
            raise InputError(
                f"distill.task_weight: with 0 nothing trains the {cls.name} head; set task: features to distil a "
                "backbone without labels, or a task_weight above 0"
            )

    @classmethod
    @abstractmethod
    def eval_transform(cls, config: DataConfig) -> Transform:
        """What evaluation does to an image [3, H, W] and its label, if it has one."""

    @abstractmethod
    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Samples -> one batch."""

    # Evaluation

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

    # The card; `config` is the student's config.json

    @classmethod
    def pipeline_tag_of(cls, config: Mapping[str, Any]) -> str:
        """The Hub's name of what a saved student does."""
        return cls.pipeline_tag

    @classmethod
    @abstractmethod
    def purpose(cls, config: Mapping[str, Any], size: str, source: str) -> str:
        """What a student is for, in one sentence.

        Args:
            config: of the student.
            size: ` of 62,894 parameters`, or nothing.
            source: where it comes from, such as `distilled from me/teacher`.
        """

    @classmethod
    @abstractmethod
    def usage(cls, config: Mapping[str, Any], name: str) -> tuple[str, str]:
        """At most five lines of code that load and use a student, and a remark on them or nothing.

        Args:
            config: of the student.
            name: what `from_pretrained` takes.
        """

    @classmethod
    def quick_usage(cls, config: Mapping[str, Any], folder: str) -> str:
        """The lines that a run prints at its end; as `usage`, for a terminal."""
        return cls.usage(config, folder)[0]

    @classmethod
    def limits(cls, config: Mapping[str, Any]) -> list[str]:
        """What a student cannot do by its kind, one sentence each."""
        return []

    # Export

    @classmethod
    def why_not_exported(cls, config: Mapping[str, Any]) -> str | None:
        """Why a student cannot be exported, told before its weights are loaded; None where it can."""
        return None

    @classmethod
    @abstractmethod
    def export_form(cls, model: PreTrainedModel, size: tuple[int, int]) -> ExportForm:
        """The exportable form of a student.

        Args:
            model: in eval mode.
            size: height and width of an image that it takes.
        """
