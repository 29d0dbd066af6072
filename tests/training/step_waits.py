"""Training and evaluation steps of every task and kind of student, and where the host waits in them.

`python -m tests.training.step_waits` prints the counts, on a GPU those that torch reports there; with names of kinds
only theirs. Kinds of detectors that match on the host have waits that are exempt, see `EXEMPT`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback, set_seed

from cankd_hf.config.data import DataConfig
from cankd_hf.config.distill import LossTerm
from cankd_hf.config.student import StudentConfig
from cankd_hf.config.teacher import TeacherConfig
from cankd_hf.data.detection.transforms import DetectionEvalTransform
from cankd_hf.losses import LOSSES, FeatureLoss
from cankd_hf.tasks import DetectionTask, FeaturesTask, SegmentationTask, Task
from cankd_hf.teachers.load import load_teacher
from tests.models import detectors, kinds
from tests.waits import DEVICE, Waits, counting_on_cuda, move, pretending

from .detector_trainers import objects
from .native_detector_configs import FAMILIES, RESNET, config, write_tokenizer
from .tiny_trainers import dinov2, trainer

# Where the host may wait in detectors -> why; nothing else may, and in no other task (docs/performance.md).
EXEMPT = {
    "transformers.loss.*": "Hungarian matching on the host, and losses that index by what it matched",
    "transformers.models.*:get_contrastive_denoising_training_group": "denoising queries made of the labels",
    "transformers.models.*EncoderLayer.forward": "whether activations overflow",
    "transformers.models.*DeformableLayer.forward": "whether activations overflow",
    "transformers.models.*Model.forward": "sizes of maps for deformable attention",
    "transformers.models.*:build_label_maps*": "phrases of a prompt",
    "transformers.models.*:generate_masks_with_special_tokens_and_transfer_map": "phrases of a prompt",
    "transformers.masking_utils:_ignore_bidirectional_mask_sdpa": "whether a mask hides anything",
    "transformers.utils.import_utils:torch_compilable_check": "checks of shapes",
    "torchvision.models.detection.*": "matching and coding of anchors, samplers, selection of detections",
    "torchvision.ops.*": "NMS, pooling by level, losses of what was matched",
    "cankd_hf.models.fpn.reppoints_cankd_fpn:assign_centres": "matching of cells to objects",
    "cankd_hf.models.fpn.reppoints_cankd_fpn:reppoints_losses": "matching of boxes to objects",
    "cankd_hf.models.fpn.modeling_cankd_fpn_detection:mask_sizes": "sizes of padded images, for the selection",
    "accelerate.accelerator:Accelerator.backward": "gradients of what was matched",
    "cankd_hf.training.tap_gradients:TapGradients.of": "the same gradients, where they are measured",
}
NAMES = kinds.NAMES


class Masks(Dataset):
    """Random images with masks, some pixels ignored; `labelled` or not."""

    def __init__(self, labelled: bool = True, size: tuple[int, int] = (64, 64)) -> None:
        self.labelled, self.size = labelled, size

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        sample = {"pixel_values": torch.randn(3, *self.size, generator=generator)}
        labels = torch.randint(0, len(NAMES), self.size, generator=generator)
        labels[:8] = kinds.IGNORED
        return sample | ({"labels": labels} if self.labelled else {})


class Boxes(Dataset):
    """Random images of two sizes, so that batches are padded, with 0 to 2 objects; the last one may be a crowd."""

    def __init__(self, crowds: bool) -> None:
        self.crowds, self.transform = crowds, DetectionEvalTransform(DataConfig())

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(0, 255, (3, 64, 96 - 32 * (index % 2)), dtype=torch.uint8, generator=generator)
        boxes = torch.tensor([[4.0, 6, 40, 30], [30, 20, 60, 60]])[: index % 3]
        found = objects(boxes, torch.arange(len(boxes)), index)
        if self.crowds and len(boxes) == 2:
            found.iscrowd[-1] = 1
        return self.transform(image, found)


def terms() -> list[LossTerm]:
    """Every loss of maps once, with weights that change in every step."""
    maps = [name for name, kind in LOSSES.items() if issubclass(kind, FeatureLoss)]
    return [LossTerm(loss=name, weight=1.0, decay=0.99) for name in maps]


def _segmentation(kind: str) -> tuple[Task, PreTrainedModel, dict[str, Any]]:
    task = SegmentationTask(NAMES, kinds.IGNORED)
    return task, kinds.student(kind), {"data": Masks(), "eval_dataset": Masks()}


def _features(kind: str) -> tuple[Task, PreTrainedModel, dict[str, Any]]:
    model = FeaturesTask().build_student(StudentConfig(backbone=BACKBONES[kind]))
    return FeaturesTask(), model, {"data": Masks(False), "eval_dataset": Masks(False), "task_weight": 0.0}


def _detection(made: Callable[[Task], PreTrainedModel]) -> tuple[Task, PreTrainedModel, dict[str, Any]]:
    task = DetectionTask({0: "red", 1: "green", 2: "blue"})
    return task, made(task), {"data": Boxes(False), "eval_dataset": Boxes(True)}


def _native(kind: str, task: Task) -> PreTrainedModel:
    given: dict[str, Any] = {"config": config(kind)}
    if "grounding" in kind:
        given["tokenizer"] = str(write_tokenizer(Path(tempfile.mkdtemp())))
    return task.build_student(StudentConfig(**given))


BACKBONES = {
    **{"resnet": kinds.RESNET, "convnext": kinds.CONVNEXT, "swin": kinds.SWIN},
    **{"dinov2": kinds.DINOV2, "timm": kinds.TIMM},
}
KINDS: dict[str, Callable[[], tuple[Task, PreTrainedModel, dict[str, Any]]]] = {
    **{f"segmentation/{kind}": partial(_segmentation, kind) for kind in kinds.KINDS},
    **{f"features/{kind}": partial(_features, kind) for kind in BACKBONES},
    **{
        f"detection/{kind}": partial(_detection, lambda task, kind=kind: detectors.detector(kind))
        for kind in detectors.DETECTORS
    },
    **{f"detection/{kind}": partial(_detection, partial(_native, kind)) for kind in FAMILIES},
}


class Window(TrainerCallback):
    """Opens the counting for the two steps after the first one, and for evaluation batches after the first one."""

    def __init__(self, waits: Waits) -> None:
        self.waits, self.batches = waits, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._open(1 <= state.global_step < 3)

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any) -> None:
        self.batches += 1
        self._open(self.batches < len(eval_dataloader))

    def _open(self, opens: bool) -> None:
        self.waits.open = opens
        self.waits.opened += opens


def counted(kind: str, folder: Path, **settings: Any) -> dict[str, Waits]:
    """Waits in two training steps, each of two accumulated batches, and in all evaluation batches but the first."""
    set_seed(0)
    real = torch.cuda.is_available()
    task, student, given = KINDS[kind]()
    pyramid = {**RESNET, "out_features": ["stage2", "stage3", "stage4"]}
    looks_at = pyramid if isinstance(task, DetectionTask) else dinov2()
    teacher = load_teacher(TeacherConfig(config=looks_at, dtype="float32"))
    waits = {"training": Waits(), "evaluation": Waits()}
    made = trainer(
        folder,
        **given,
        task=task,
        model=student,
        teacher=teacher,
        terms=terms(),
        **{
            "max_steps": 3,
            "logging_steps": 100,
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "optim": "adamw_torch_fused",
            "use_cpu": not real,
            "accelerator_config": {"non_blocking": True},
            **settings,
        },
    )
    with pytest.MonkeyPatch.context() as patch:
        if not real:
            vars(made.args)["_setup_devices"] = DEVICE
            made.guard.__init__(made)
        for name, run in (("training", made.train), ("evaluation", made.evaluate)):
            made.add_callback(window := Window(waits[name]))
            with counting_on_cuda(waits[name]) if real else pretending(waits[name], patch):
                if not real:
                    move(made.model)
                    for one in made.teachers.values():
                        move(one)
                run()
            made.remove_callback(window)
    return waits


def exempt(kind: str) -> dict[str, str]:
    return EXEMPT if kind.startswith("detection/") else {}


def main(names: list[str]) -> None:
    print(f"on {'CUDA' if torch.cuda.is_available() else 'a pretended device'}")
    print(f"{'kind':40} {'step':12} waits  exempt")
    for kind in (kind for name in names or [""] for kind in KINDS if kind.startswith(name)):
        with tempfile.TemporaryDirectory() as folder:
            found = counted(kind, Path(folder))
        for name, waits in found.items():
            left, total = waits.without(exempt(kind)), sum(waits.found.values())
            print(f"{kind:40} {name:12} {sum(left.values()):5} {total - sum(left.values()):7}")
            for (operation, where), number in sorted(left.items()):
                print(f"    {number:4}  {operation}  {where}")


if __name__ == "__main__":
    main(sys.argv[1:])
