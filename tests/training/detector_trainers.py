"""Detection for tests of arithmetic: students without BatchNorm and dropout, and a detector that nearly knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PretrainedConfig, PreTrainedModel, set_seed
from transformers.utils import ModelOutput

from cankd_hf.config.data import DataConfig
from cankd_hf.config.distill import LossTerm
from cankd_hf.config.student import StudentConfig
from cankd_hf.data.common.unlabelled import WithUnlabelled
from cankd_hf.data.detection.objects import Objects
from cankd_hf.data.detection.transforms import DetectionEvalTransform
from cankd_hf.tasks import DetectionTask
from cankd_hf.teachers.load import load_teacher
from cankd_hf.training.arguments import CanKDConfig
from cankd_hf.training.trainer import CanKDTrainer

from .native_detector_configs import config
from .tiny_trainers import trainer

NAMES = {0: "cat", 1: "dog", 2: "emu"}
IMAGES = 13
CONVNEXT = {"model_type": "convnext", "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
# The loss of FCOS is a mean over the cells with an object in this process's images, that of RetinaNet a mean over
# images, that of Conditional DETR a sum over the mean number of objects of all processes.
STUDENTS = {
    "fcos": StudentConfig(backbone=CONVNEXT, fpn={"head": "fcos", "fpn_channels": 16, "norm": "group"}),
    "retinanet": StudentConfig(backbone=CONVNEXT, fpn={"head": "retinanet", "fpn_channels": 16, "norm": "group"}),
    "dino": StudentConfig(config={**config("cankd_dino"), "num_denoising": 0}),
    "conditional_detr": StudentConfig(config={**config("conditional_detr"), "dropout": 0.0}),
}


class Boxed(Dataset):
    """Random images of one size with 1 to 3 boxes each; `alike`: the same boxes in all of them."""

    def __init__(self, count: int, alike: bool = False) -> None:
        self.count, self.alike = count, alike
        self.transform = DetectionEvalTransform(DataConfig())

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(0, 255, (3, 64, 96), dtype=torch.uint8, generator=generator)
        boxes = torch.tensor([[4.0, 6, 40, 30], [50, 20, 90, 60], [10, 34, 44, 62]])
        count = 2 if self.alike else 1 + index % 3
        kinds = torch.randint(0, 3, (count,), generator=generator)
        shift = 0 if self.alike else index % 4
        return self.transform(image, objects(boxes[:count] + shift, kinds, index))


def objects(boxes: Tensor, classes: Tensor, number: int) -> Objects:
    return Objects(boxes, classes, (boxes[:, 2:] - boxes[:, :2]).prod(1), torch.zeros_like(classes), number)


class Double(Boxed):
    """The same in double precision."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        made = super().__getitem__(index)
        return {**made, "pixel_values": made["pixel_values"].double()}


def detector_trainer(folder: Path, kind: str, **settings: Any) -> CanKDTrainer:
    """Two SGD steps of a detector through the task; only FCOS gets images that all hold the same boxes.

    Those of DINO are in double precision: in single, two equal runs are 1.5e-6 apart where a CPU has no AVX-512.
    """
    set_seed(0)
    task = DetectionTask(NAMES)
    if kind == "dino":
        made = trainer(folder, Double(16), model=task.build_student(STUDENTS[kind]).double(), task=task, **settings)
        made.distiller.double()
        return made
    return trainer(
        folder, Boxed(16, alike=kind == "fcos"), model=task.build_student(STUDENTS[kind]), task=task, **settings
    )


class Bare(Dataset):
    """Further random images, without boxes."""

    def __init__(self, count: int) -> None:
        self.images = Boxed(100 + count)

    def __len__(self) -> int:
        return len(self.images) - 100

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.images[100 + index]["pixel_values"]}


def taught_trainer(folder: Path, kind: str, **settings: Any) -> CanKDTrainer:
    """Two SGD steps of a detector on labelled images and on what a detector of random weights finds in others."""
    set_seed(1)
    teacher = load_teacher(DetectionTask(NAMES).build_student(STUDENTS["retinanet"]))
    set_seed(0)
    task = DetectionTask(NAMES)
    term = LossTerm(loss="pseudo_boxes", weight=2.0, options={"share": 1.0, "floor": 0.001})
    model, images = task.build_student(STUDENTS[kind]), WithUnlabelled(Boxed(16), Bare(16))
    return trainer(folder, images, model=model, task=task, teacher=teacher, terms=[term], **settings)


class Numbered(Dataset):
    """Images of several sizes with 0 to 4 objects; the number of an image is the value of its pixels."""

    def __init__(self) -> None:
        self.transform = DetectionEvalTransform(DataConfig())

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> dict[str, Any]:
        size = (256 + 8 * (index % 3), 320 - 8 * (index % 4))
        boxes, classes, _ = answer(index)
        return self.transform(torch.full((3, *size), index, dtype=torch.uint8), objects(boxes, classes, index))


def answer(index: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Boxes and classes of one image, and what the detector takes them for."""
    generator = torch.Generator().manual_seed(index)
    count = index % 5
    corner = torch.rand(count, 2, generator=generator) * 130
    boxes = torch.cat([corner, corner + 20 + torch.rand(count, 2, generator=generator) * 99], 1)
    classes = torch.randint(0, 3, (count,), generator=generator)
    guessed = torch.where(torch.rand(count, generator=generator) < 0.8, classes, (classes + 1) % 3)
    scores = 0.3 + torch.randint(0, 3, (count,), generator=generator) / 9
    seen = boxes + torch.randn(count, 4, generator=generator) * 4
    return boxes, classes, {"boxes": seen, "labels": guessed, "scores": scores}


class KnowingForObjectDetection(PreTrainedModel):
    """Reads the number of an image off its first pixel and gives the detections of `answer`."""

    config_class = PretrainedConfig

    def __init__(self) -> None:
        super().__init__(PretrainedConfig(id2label=NAMES))
        self.unused = nn.Linear(1, 1)

    def forward(self, pixel_values: Tensor, labels: Any = None, **_: Any) -> ModelOutput:
        height, width = pixel_values.shape[-2:]
        logits = torch.full((len(pixel_values), 4, 3), -1e4)
        boxes = torch.zeros(len(pixel_values), 4, 4)
        for row, value in enumerate(pixel_values[:, 0, 0, 0].tolist()):
            found = answer(round((value * 0.229 + 0.485) * 255))[2]
            count = range(len(found["scores"]))
            logits[row, count, found["labels"]] = found["scores"].logit()
            corners = found["boxes"]
            centres = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1)
            boxes[row, count] = centres / torch.tensor([width, height] * 2)
        return ModelOutput(loss=logits.new_zeros(()), logits=logits, pred_boxes=boxes)


def scores(folder: Path, batch_size: int) -> dict[str, float]:
    """COCO scores of the 13 images by `CanKDTrainer.evaluate` and the task."""
    args = CanKDConfig(str(folder), per_device_eval_batch_size=batch_size, use_cpu=True, report_to="none")
    made = CanKDTrainer(KnowingForObjectDetection(), None, args, eval_dataset=Numbered())
    return {key: value for key, value in made.evaluate().items() if key.startswith(("eval_ap", "eval_ar"))}
