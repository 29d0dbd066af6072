"""Batches whose images differ, for test_ragged and its two processes: what arrives, and the scores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from transformers import set_seed

from cankd_hf.tasks import DetectionTask
from cankd_hf.training.arguments import CanKDConfig
from cankd_hf.training.trainer import CanKDTrainer

from .detector_trainers import NAMES, STUDENTS, Boxed, KnowingForObjectDetection, Numbered
from .tiny_trainers import student, trainer

BATCH = 2  # images of one process
COUNTS = (13, 5, 1)  # the last: fewer than processes
KINDS = ("map", "stream", "sized")


class Sizes(Dataset):
    """Images of several sizes with a mask."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        image = torch.randn(3, 64 + 32 * (index % 3), 64 + 32 * (index % 2), generator=generator)
        return {"pixel_values": image, "labels": (image[0] > 0).long() + 2 * (image[1] > 0).long()}


class First(Dataset):
    """The first samples of a data set."""

    def __init__(self, data: Dataset, count: int) -> None:
        self.data, self.count = data, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


class Streamed(IterableDataset):
    def __init__(self, data: Any) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        for index in range(len(self.data)):
            if worker is None or index % worker.num_workers == worker.id:
                yield self.data[index]


class Sized(Streamed):
    def __len__(self) -> int:
        return len(self.data)


def as_kind(kind: str, data: Any) -> Any:
    return {"map": lambda data: data, "stream": Streamed, "sized": Sized}[kind](data)


def scores(folder: Path) -> dict[str, dict[str, float]]:
    """All scores and losses of both tasks, for each kind and number of images."""
    found = {}
    settings: dict[str, Any] = {"per_device_eval_batch_size": BATCH, "use_cpu": True, "report_to": "none"}
    task = DetectionTask(NAMES)
    models = {"boxes": (KnowingForObjectDetection(), task, Numbered()), "masks": (student(), None, Sizes(13))}
    for name, (model, own, data) in models.items():
        made = CanKDTrainer(model, None, CanKDConfig(str(folder), **settings), task=own)
        for kind in KINDS:
            for count in COUNTS:
                scored = made.evaluate(as_kind(kind, First(data, count)))
                found[f"{name} {kind} {count}"] = _lasting(scored)
    made.args.dataloader_num_workers = 2
    found["masks map workers"] = _lasting(made.evaluate(Sizes(13)))
    return found


def _lasting(scored: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in scored.items() if not key.endswith(("time", "per_second"))}


def train_boxes(
    folder: Path, kind: str, batch: int, count: int = 14, **settings: Any
) -> tuple[list[int], list[float]]:
    """The number of boxes of each image that the student got, and the losses."""
    set_seed(0)
    task = DetectionTask(NAMES)
    data = as_kind(kind, First(Boxed(16), count))
    settings = {"max_steps": 4, "per_device_train_batch_size": batch, **settings}
    made = trainer(folder, data, model=task.build_student(STUDENTS["retinanet"]), task=task, **settings)
    boxes: list[int] = []

    def look(_: Any, __: Any, given: dict[str, Any]) -> None:
        boxes.extend(len(label["boxes"]) for label in given["labels"])

    made.student.register_forward_pre_hook(look, with_kwargs=True)
    made.train()
    return boxes, [entry["loss"] for entry in made.state.log_history if "loss" in entry]
