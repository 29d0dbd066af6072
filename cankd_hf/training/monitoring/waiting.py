"""What helps a training that waits for images, of what its settings leave open."""

import os
from typing import Any

import torch
from transformers import TrainingArguments

from cankd_hf.data.common.dataset import ImageDataset
from cankd_hf.host import usable_cores


def what_helps(args: TrainingArguments, dataset: Any) -> str:
    """Advice for a run that waits for images.

    Args:
        args: of the training.
        dataset: its training set.
    """
    workers, processes = args.dataloader_num_workers, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = max(1, usable_cores() // processes)
    busy = torch.get_num_threads() if args.device.type == "cpu" else 1
    found = []
    if busy + workers < cores:
        found.append(f"try more training.dataloader_num_workers (now {workers}, {cores} cores can be used)")
    if any(part.is_read_each_time for part in _images(dataset)):
        found.append("if the decoded images fit into memory, set data.cache: true")
    if found:
        return "; ".join(found)
    shared = f"loading and training share {cores} core{'s' if cores > 1 else ''}" if busy + workers >= cores else ""
    return shared or "smaller image files on a faster disk, or less augmentation, are what is left"


def _images(dataset: Any) -> list[ImageDataset]:
    """The data sets of images inside of wrappers."""
    if isinstance(dataset, ImageDataset):
        return [dataset]
    inner = [
        vars(dataset)[name]
        for name in ("dataset", "labelled", "unlabelled")
        if name in getattr(dataset, "__dict__", {})
    ]
    return [found for part in inner for found in _images(part)]
