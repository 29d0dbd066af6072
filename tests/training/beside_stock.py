"""The stock Trainer and ours side by side: the same student, data and settings, no teacher."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments

from cankd_hf.training.arguments import CanKDConfig
from cankd_hf.training.trainer import CanKDTrainer

from .tiny_trainers import Images, student, teacher, terms

SETTINGS: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "learning_rate": 0.05,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "optim": "adamw_torch",
}
# What no two runs share, and what only ours logs.
TIMES = re.compile(r".*(runtime|per_second|preparation_time|total_flos)$|.*_mem_")
OURS = re.compile(
    r"loss_|raw_|branch_share|images_per_second|data_wait|train_seconds|train_joules|eval_(\w+_)?(iou|miou|pixel_acc|mean_acc)"
)


def images(count: int = 6) -> Images:
    return Images(count, size=32)


def accuracy(prediction: EvalPrediction, **_: Any) -> dict[str, float]:
    """A metric that sees logits or predicted classes, at a quarter of the labels' size."""
    found, labels = prediction.predictions, prediction.label_ids[:, ::4, ::4]
    found = found.argmax(1) if found.ndim == 4 else found
    return {"accuracy": float(np.mean(found == labels)), "checksum": float(np.abs(prediction.predictions).sum())}


def pixel_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    """A loss over all pixels of the accumulated batch."""
    logits = torch.nn.functional.interpolate(outputs.logits, size=labels.shape[-2:])
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


def stock(folder: Path, *, cls: Any = Trainer, model: Any = None, args: Any = TrainingArguments, **given: Any) -> Any:
    """A stock Trainer; arguments that are not of the Trainer are settings."""
    names = ("train_dataset", "eval_dataset", "compute_metrics", "preprocess_logits_for_metrics", "callbacks")
    more = ("optimizers", "optimizer_cls_and_kwargs", "compute_loss_func", "model_init", "data_collator", "teacher")
    kwargs = {name: given.pop(name) for name in (*names, *more, "terms", "task_weight") if name in given}
    kwargs.setdefault("train_dataset", images())
    if "model_init" not in kwargs:
        kwargs["model"] = student() if model is None else model
    return cls(args=args(str(folder), **{**SETTINGS, **given}), **kwargs)


def ours(folder: Path, **given: Any) -> CanKDTrainer:
    """The same with a `CanKDTrainer`."""
    return stock(folder, **{"cls": CanKDTrainer, "args": CanKDConfig, **given})


def history(trainer: Any) -> list[dict[str, Any]]:
    """What was logged, without times and what only ours logs."""
    return [
        {key: value for key, value in entry.items() if not TIMES.match(key) and not OURS.match(key)}
        for entry in trainer.state.log_history
    ]


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    """The student's tensors."""
    model = trainer.student if isinstance(trainer, CanKDTrainer) else trainer.model
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def assert_same(control: Any, made: Any) -> None:
    """Equal numbers, bit for bit."""
    assert history(made) == history(control)
    theirs, own = weights(control), weights(made)
    assert own.keys() == theirs.keys()
    for name, value in own.items():
        assert torch.equal(value, theirs[name]), name
    assert made.state.global_step == control.state.global_step
    assert checkpoints(Path(made.args.output_dir)) == checkpoints(Path(control.args.output_dir))


def both(folder: Path, do: Callable[[Any], Any] = lambda made: made.train(), **given: Any) -> tuple[Any, Any]:
    """Runs both and asserts that they give the same; values that are functions are called for each."""
    made = []
    for name, build in (("stock", stock), ("ours", ours)):
        own = {key: value() if key in FRESH else value for key, value in given.items()}
        made.append(build(folder / name, **own))
        do(made[-1])
    assert_same(*made)
    return made[0], made[1]


FRESH = {"callbacks", "optimizers", "model"}  # made anew for each trainer


class Events(TrainerCallback):
    """The names of the events in their order."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_"):
            return lambda *args, **kwargs: self.seen.append(name)
        return super().__getattribute__(name)


def taught(folder: Path, **settings: Any) -> CanKDTrainer:
    return ours(folder, **{"teacher": teacher(), "terms": terms(), "max_steps": 2, **settings})


class Unlabelled(Dataset):
    """The images of a data set alone."""

    def __init__(self, labelled: Any) -> None:
        self.labelled = labelled

    def __len__(self) -> int:
        return len(self.labelled)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.labelled[index]["pixel_values"]}
