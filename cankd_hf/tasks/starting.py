"""What a first recipe of a task has that those of other tasks have not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Starter:
    """The parts of a first recipe that depend on its task.

    Attributes:
        what: the task in words, for the first line of a recipe.
        head: settings of the student's pyramid, in which `{channels}` stands for its width; empty: a backbone alone.
        outputs: indices of the stages of a backbone alone.
        labelled: whether it learns from labels; without, from the teacher alone.
        learning_rate: for AdamW.
        batch: images of a batch on a CPU; on a GPU twice as many.
        least: training images below which no teacher is proposed.
        pays: what is known about when distilling pays, from docs/when.md, one sentence each.
    """

    what: str
    head: Mapping[str, str] = field(default_factory=dict)
    outputs: tuple[int, ...] = ()
    labelled: bool = True
    learning_rate: float = 5e-4
    batch: int = 8
    least: int = 0
    pays: tuple[str, ...] = ()


MASKS = Starter(
    "gives each pixel a class",
    {"fpn_channels": "{channels}", "head_channels": "{channels}"},
    pays=(
        "At equal time a small student alone beat the distilled one on CamVid (40.1 against 38.7 mIoU).",
        "It pays where the student alone gets no better, or where few images have labels and many have none.",
    ),
)
BOXES = Starter(
    "finds objects as boxes",
    {"head": "fcos", "fpn_channels": "{channels}"},
    learning_rate=2e-4,
    least=5000,
    pays=("On small sets of boxes distilling did not pay (BCCD: 51.5 AP alone, 50.5 and 51.3 with a teacher).",),
)
BACKBONE = Starter(
    "learns the feature maps of a teacher from images alone",
    outputs=(3, 4),
    labelled=False,
    learning_rate=1e-3,
    batch=16,
    pays=(
        "The result is a backbone: name it as student.backbone of a recipe that has labels.",
        "Large published gains are with many images and many epochs; on few images expect little.",
    ),
)
