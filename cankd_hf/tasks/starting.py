"""What a first recipe of a task has that those of other tasks have not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

SCALE = ("[0.5, 2.0]", "random size of a training image, so that objects are seen in many sizes")


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
        task_loss: on maps of a teacher of the same task, the one that did best where it was measured; "": none was.
        share: of the gradient, that this loss is given beside a student with pretrained weights; 0: none was measured.
        pays: what is known about when distilling pays, from docs/when.md, one sentence each.
        data: further settings of `data`, each with the reason for it.
    """

    what: str
    head: Mapping[str, str] = field(default_factory=dict)
    outputs: tuple[int, ...] = ()
    labelled: bool = True
    learning_rate: float = 5e-4
    batch: int = 8
    least: int = 0
    task_loss: str = ""
    share: float = 0.0
    pays: tuple[str, ...] = ()
    data: Mapping[str, tuple[str, str]] = field(default_factory=lambda: {"scale": SCALE})


MASKS = Starter(
    "gives each pixel a class",
    {"fpn_channels": "{channels}", "head_channels": "{channels}"},
    task_loss="channel_wise",
    share=0.1,
    pays=(
        "CamVid, equal time, with a teacher in every step: alone 40.1 mIoU, distilled 38.7. With its answers stored",
        "for whole images and loss channel_wise, at equal cost: alone 38.3, distilled 42.0 (one student, five seeds).",
        "That student began from scratch. One with ImageNet weights, by a tenth of the gradient that ends early, at",
        "equal cost: alone 49.9, distilled 50.8, which is no proof; with 46 labels alone 46.5, distilled 47.8, and as",
        "much from a teacher of random weights: it regularises.",
    ),
)
BOXES = Starter(
    "finds objects as boxes",
    {"head": "fcos", "fpn_channels": "{channels}"},
    learning_rate=2e-4,
    least=5000,
    task_loss="channel_wise",
    pays=(
        "BCCD, a teacher stored for whole images, loss channel_wise: at equal steps alone 45.3 AP, distilled",
        "49.8; at equal cost alone 49.6, distilled 49.8, no difference shown (five seeds). With 26 labels, at",
        "equal cost: alone 45.3, distilled on the same images 47.0.",
    ),
    data={"scale": ("[0.8, 1.25]", SCALE[1])},
)
INSTANCES = Starter(
    "finds objects and outlines them",
    {"head": "faster_rcnn", "masks": "true", "fpn_channels": "{channels}"},
    learning_rate=2e-4,
    least=5000,
    pays=("Nothing was measured of masks yet; on small sets of boxes distilling did not pay (docs/when.md).",),
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
DEPTH = Starter(
    "tells the distance of every pixel",
    {"fpn_channels": "{channels}", "head_channels": "{channels}"},
    pays=("Of depth only generated scenes were measured (docs/depth.md): AbsRel 0.119 alone, 0.109 distilled.",),
    data={
        "scale": ("[1.0, 1.3]", "random size of a training image: what is enlarged is as much nearer"),
        "depth": ("{kind: metric}", "metres; relative for several cameras or unknown units: docs/depth.md"),
    },
)
CLASSES = Starter(
    "gives each image a class",
    outputs=(3, 4),
    batch=16,
    pays=("Of classes of images only generated ones were measured: docs/classification.md.",),
    data={"scale": ("[0.8, 1.5]", "random size of a training image, of which crop_size is cut out")},
)
