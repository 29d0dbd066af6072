"""Small pieces of a real run: a student, a teacher, images and a trainer that together take a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import ConvNextConfig, Dinov2Config, set_seed

from cankd_hf.config.data import DataConfig, StrongConfig
from cankd_hf.config.distill import LossTerm
from cankd_hf.config.teacher import TeacherConfig
from cankd_hf.data.common.unlabelled import WithUnlabelled
from cankd_hf.data.segmentation.load import load_segmentation
from cankd_hf.models.fpn.configuration_cankd_fpn import FPNConfig
from cankd_hf.models.fpn.modeling_cankd_fpn import FPNForSemanticSegmentation
from cankd_hf.teachers.load import load_teacher
from cankd_hf.teachers.teacher import Teacher
from cankd_hf.training.arguments import CanKDConfig
from cankd_hf.training.trainer import CanKDTrainer

CLASSES = 4


class Images(Dataset):
    """Random images with a mask that can be learnt from them; `noisy` adds what a random augmentation would."""

    def __init__(self, count: int, size: int = 64, noisy: bool = False) -> None:
        generator = torch.Generator().manual_seed(7)
        self.images = torch.randn(count, 3, size, size, generator=generator)
        self.noisy = noisy

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image = self.images[index]
        if self.noisy:
            image = image + 0.1 * torch.randn_like(image)
        labels = (image[0] > 0).long() + 2 * (image[1] > 0).long()
        return {"pixel_values": image, "labels": labels}


def student(seed: int = 0, **overrides: Any) -> FPNForSemanticSegmentation:
    """A pyramid student without BatchNorm: the same images give the same gradients however they are batched."""
    set_seed(seed)
    backbone = ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_indices=[1, 2, 3, 4])
    settings: dict[str, Any] = {
        "backbone_config": backbone,
        "fpn_channels": 16,
        "head_channels": 16,
        "norm": "group",
        "dropout": 0.0,
        "num_labels": CLASSES,
    }
    return FPNForSemanticSegmentation(FPNConfig(**{**settings, **overrides}))


def dinov2() -> dict[str, Any]:
    """A DINOv2 of two thin blocks, with the dropout and drop path that a frozen teacher must not use."""
    config = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=14,
        image_size=56,
        drop_path_rate=0.3,
        hidden_dropout_prob=0.3,
    )
    return {"model_type": "dinov2", **config.to_diff_dict()}


def teacher(seed: int = 1) -> Teacher:
    set_seed(seed)
    return load_teacher(TeacherConfig(config=dinov2()))


def terms(**overrides: Any) -> list[LossTerm]:
    """CanKD without its BatchNorm, for the same reason as in `student`."""
    return [LossTerm(**{"loss": "cankd", "weight": 2.0, "options": {"output_norm": "none"}, **overrides})]


def trainer(folder: Path, data: Any = None, **overrides: Any) -> CanKDTrainer:
    """A trainer for two SGD steps of eight images; keyword arguments of the trainer or of its arguments change it."""
    own = (
        "model",
        "teacher",
        "terms",
        "task_weight",
        "eval_dataset",
        "processing_class",
        "recipe",
        "callbacks",
        "task",
        "teachers",
        "objective",
        "data_collator",
    )
    kwargs = {key: overrides.pop(key) for key in own if key in overrides}
    settings: dict[str, Any] = {
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
    }
    settings.update(overrides)
    given_terms = kwargs.pop("terms", terms())
    return CanKDTrainer(
        kwargs.pop("model", None) or student(),
        kwargs.pop("teacher") if "teacher" in kwargs else teacher(),
        CanKDConfig(str(folder), **settings),
        terms=given_terms,
        train_dataset=data if data is not None else Images(16),
        **kwargs,
    )


def weights(made: CanKDTrainer) -> dict[str, torch.Tensor]:
    """A copy of everything that trains."""
    return {name: value.detach().clone() for name, value in made.distiller.state_dict().items()}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def of_shapes(folder: Path, scale: tuple[float, float] = (0.5, 2.0), **settings: Any) -> CanKDTrainer:
    """A trainer with generated images, half of each batch without labels; further settings of `StrongConfig` too."""
    strong = {key: settings.pop(key) for key in [*settings] if key in StrongConfig.__dataclass_fields__}
    data = load_segmentation(
        DataConfig(
            path="shapes",
            unlabelled="shapes",
            generated={"train": 8, "validation": 2, "test": 2, "unlabelled": 12, "size": 64},
            image_size=[64, 64],
            scale=[*scale],
            strong=StrongConfig(**strong),
        )
    )
    settings = {"model": student(num_labels=6), **settings}
    return trainer(folder, WithUnlabelled(data.train, data.unlabelled), **settings)
