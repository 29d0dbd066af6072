"""The base class of tasks: all that depends on the kind of a task, and nothing of distillation."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.image_utils import PILImageResampling

from cankd_hf.config.data import DataConfig
from cankd_hf.config.student import StudentConfig
from cankd_hf.data.common.dataset import Transform
from cankd_hf.data.common.mixing import paste
from cankd_hf.data.common.opening import SplitCatalog, open_set
from cankd_hf.data.common.sources import ROLES, TaskData
from cankd_hf.data.features.load import load_images
from cankd_hf.errors import InputError
from cankd_hf.names import INSTALL
from cankd_hf.tasks.export_forms import ExportForm
from cankd_hf.tasks.labelling import Labelling
from cankd_hf.tasks.overview import Overview
from cankd_hf.tasks.panels import panels
from cankd_hf.tasks.pictures import ROWS, draw_grid, sample_evenly
from cankd_hf.tasks.showing import Showing
from cankd_hf.tasks.starting import Starter

NOTE = (
    f"The model code lies beside the weights. After `{INSTALL}` and `import cankd_hf` it loads without "
    "`trust_remote_code`."
)


class Metric(NamedTuple):
    """Names of a score: on the Hub (as a metric's type), in the tables of a card, and in a sentence."""

    hub: str
    title: str
    short: str = ""


def class_names(config: Mapping[str, Any]) -> list[str]:
    """Names of the classes in a config.json; empty without classes."""
    return [str(name) for name in (config.get("id2label") or {}).values()]


def listed(names: Sequence[str]) -> str:
    """The first twenty names, for a sentence."""
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


def class_labels(model: PreTrainedModel) -> dict[int, str]:
    """Names of a model's classes; empty without classes."""
    return {int(index): str(name) for index, name in (model.config.id2label or {}).items()}


def stretched(config: DataConfig) -> dict[str, Any]:
    """Settings of an image processor that resizes as evaluation does, ignoring the aspect ratio, and normalises."""
    size = config.image_size
    return {
        "do_resize": size is not None,
        "size": {"height": size[0], "width": size[1]} if size is not None else None,
        "resample": PILImageResampling.BILINEAR,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
    }


def trusted(config: Mapping[str, Any]) -> tuple[str, str, str]:
    """What the code of a card needs where the model is one of ours: a line before, an argument, and a note."""
    ours = bool(config.get("auto_map"))
    local = not ours and str(config.get("model_type")).startswith("cankd_")
    before = "import cankd_hf  # knows the model\n" if local else ""
    return before, ", trust_remote_code=True" if ours else "", NOTE if ours else ""


class Task(Showing, ABC):
    """Base class of tasks; only its subclasses depend on the kind of task. See CONTRIBUTING for how to add one."""

    name: ClassVar[str]  # in a recipe
    metric: ClassVar[str]  # the score that selects the best checkpoint and fills the result table
    greater_is_better: ClassVar[bool] = True  # the direction of `metric`
    metrics: ClassVar[Mapping[str, Metric]]  # scores that tables and cards show, in their order; `metric` among them
    # Beginnings of the names of all other scores; by default any name may be one.
    further_scores: ClassVar[tuple[str, ...]] = ("",)
    pipeline_tag: str  # the Hub's name of the task; may differ between students of one task
    needs_teacher_in_evaluation: ClassVar[bool] = False  # to compare the student's maps with the teacher's
    ragged_labels: ClassVar[bool] = False  # a dict for each image, with tensors of different lengths
    label_kind: ClassVar[str] = "images"  # what a data set must have: `masks`, `boxes`, ...; `images` alone
    overview: ClassVar[type[Overview]] = Overview  # counts the labels of a data set, and draws them
    starter: ClassVar[Starter | None] = None  # of its first recipe, for `cankd init`
    takes_labels: ClassVar[bool] = False  # training and scores need `labels`, which `label_problem` checks
    # The auto class by which teachers that have this head are loaded with it; None: as backbones where they have one.
    teacher_head: ClassVar[str | None] = None
    ignore_index: int = 255  # label of pixels that count for nothing
    id2label: dict[int, str] = {}  # empty for a task without classes

    # Models

    @classmethod
    @abstractmethod
    def recognises(cls, architecture: str) -> bool:
        """Whether a model of this class name is a student of this task."""

    @classmethod
    def accepts(cls, model: PreTrainedModel) -> bool:
        """Whether this model can be trained by this task; a subclass of a student is one by its base."""
        return any(cls.recognises(kind.__name__) for kind in type(model).__mro__)

    @classmethod
    @abstractmethod
    def from_model(cls, model: PreTrainedModel) -> Task:
        """The task as described by the model's config, for use without a recipe."""

    def for_model(self, model: PreTrainedModel) -> Task:
        """The task with batches and image processor adapted to this model."""
        return self

    @abstractmethod
    def build_student(self, config: StudentConfig) -> PreTrainedModel:
        """The student with a head for the classes of the data."""

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
        """Loads and checks splits (of train, eval and test) of the data set, and creates its task.

        `labelled`: whether labels are needed. Raises InputError for data that cannot be used.
        """

    @classmethod
    def open_data(cls, config: DataConfig) -> SplitCatalog:
        """The data set at `data.path` with the labels of this task, whose splits are not read yet.

        Raises:
            InputError: where there is none, or it has no such labels.
        """
        return open_set(config, need_masks=False)

    @classmethod
    def images(cls, config: DataConfig) -> TaskData:
        """The training split without labels, for a part of a run without a task loss."""
        return load_images(config, ("train",))

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
        """The transform of evaluation, for an image [3, H, W] and its label or None."""

    @abstractmethod
    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Makes a batch of samples."""

    def mix_labels(self, labels: Any, seen: Tensor, plan: Sequence[Sequence[int]]) -> Any:
        """The labels of a batch whose student's pictures are erased where `seen` [B, H, W] is False, then mixed by
        `plan`, see `paste`. Masks [B, H, W] are void where the picture is erased."""
        return paste(labels.masked_fill(~seen, self.ignore_index), plan)

    def counted_labels(self, labels: Any) -> tuple[Any, Tensor | None]:
        """The labels of a batch for the student's own loss, and a factor [] of it, None for 1.

        The factor is 0 for a batch in which nothing is labelled, of which some models take the mean over nothing.
        """
        return labels, None

    def label_problem(self, labels: Any, size: tuple[int, int], scored: bool) -> str | None:
        """What is wrong with the `labels` of one sample, whose image has this height and width; None if nothing is.

        `scored`: they are for evaluation. Called for the first samples of a data set before training.
        """
        return None

    def why_not_scored(self, model: PreTrainedModel) -> str | None:
        """Why another model of this task, such as a teacher, has no score on this task's data; None if it has."""
        return None if class_labels(model) == self.id2label else "its classes differ from those of the data"

    # Labels by a teacher

    @classmethod
    def labelling(cls) -> type[Labelling]:
        """How a teacher's predictions become labels of a data set, for `cankd label`.

        Raises:
            InputError: for a task without labels.
        """
        raise InputError(f"teacher: expected a model with a head whose outputs are labels, got one of {cls.name}")

    # Evaluation

    def model_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The part of an evaluation batch that the model's forward takes."""
        return dict(inputs)

    @abstractmethod
    def statistics(
        self, outputs: Mapping[str, Any], inputs: Mapping[str, Any], student: PreTrainedModel
    ) -> Tensor | dict[str, Tensor]:
        """Statistics of each image for the scores, [B, ...], small enough to keep for a whole validation set.

        Args:
            outputs: of the `Distiller`: `logits`, the student's own `outputs`, `similarity` where it is measured.
            inputs: of the batch.
            student: the model.
        """

    @abstractmethod
    def scores(self, statistics: Any) -> dict[str, float]:
        """Scores from the statistics of all images, arrays [N, ...]; exact for any number of processes."""

    def picture(self, data: Any, models: Mapping[str, PreTrainedModel], file: Path, config: DataConfig) -> bool:
        """Draws answers of the models to a few images, spread over the data, into a file, see `Showing`.

        Returns:
            Whether the task has such a picture.
        """
        if not self.pictured:
            return False
        rows = [panels(self, sample, models, config) for sample in sample_evenly(data, ROWS)]
        titles, pictures, captions = ["image", "ground truth", *models], *zip(*rows, strict=True)
        draw_grid(Path(file), titles, pictures, self.legend(), self.picture_note, captions)
        return True

    # The card; `config` is the student's config.json, `name` or `folder` what `from_pretrained` takes

    @classmethod
    def pipeline_tag_of(cls, config: Mapping[str, Any]) -> str:
        """The `pipeline_tag` of a saved student."""
        return cls.pipeline_tag

    @classmethod
    @abstractmethod
    def purpose(cls, config: Mapping[str, Any], size: str, source: str) -> str:
        """The student's purpose in one sentence.

        `size`: ` of 62,894 parameters`, or empty; `source`: its origin, such as `distilled from me/teacher`.
        """

    @classmethod
    @abstractmethod
    def usage(cls, config: Mapping[str, Any], name: str) -> tuple[str, str]:
        """At most five lines of code that load and use a student, and a note on them, which may be empty."""

    @classmethod
    def quick_usage(cls, config: Mapping[str, Any], folder: str) -> str:
        """The shorter code that a run prints at its end."""
        return cls.usage(config, folder)[0]

    @classmethod
    def limits(cls, config: Mapping[str, Any]) -> list[str]:
        """Limits of a student, one sentence each."""
        return []

    # Export

    @classmethod
    def why_not_exported(cls, config: Mapping[str, Any]) -> str | None:
        """Why a student cannot be exported, checked before its weights are loaded; None if it can."""
        return None

    @classmethod
    @abstractmethod
    def export_form(cls, model: PreTrainedModel, size: tuple[int, int]) -> ExportForm:
        """The exportable form of a student in eval mode; `size`: height and width of an image that it takes."""


class PipelineTask(Task):
    """A task whose students run in a pipeline of transformers, which the usage code of a card calls."""

    prints: ClassVar[str]  # what the code on a card prints of each result, beside its label

    @classmethod
    def call_arguments(cls, config: Mapping[str, Any]) -> str:
        """Further arguments of the pipeline's call, as code."""
        return ""

    @classmethod
    def usage(cls, config: Mapping[str, Any], name: str) -> tuple[str, str]:
        before, trust, note = trusted(config)
        code = (
            f"{before}from transformers import pipeline\n\n"
            f'predict = pipeline("{cls.pipeline_tag_of(config)}", {json.dumps(name)}{trust})\n'
            f'for found in predict("photo.jpg"{cls.call_arguments(config)}):\n'
            f'    print(found["label"], {cls.prints})'
        )
        return code, note

    @classmethod
    def quick_usage(cls, config: Mapping[str, Any], folder: str) -> str:
        known = config["model_type"].startswith("cankd_")
        ours = "import cankd_hf  # or trust_remote_code=True where it is not installed\n" if known else ""
        call = (
            f'pipeline("{cls.pipeline_tag_of(config)}", {json.dumps(folder)})("photo.jpg"{cls.call_arguments(config)})'
        )
        return f"{ours}from transformers import pipeline\n{call}"
