"""The steps of the command: read, plan, build, fill, save."""

import argparse
import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from cankd_hf.config.data import DataConfig
from cankd_hf.convert import dense, detectors, segmenters
from cankd_hf.convert.dino import dino
from cankd_hf.convert.reading import Checkpoint, class_names, read_checkpoint
from cankd_hf.convert.rules import Plan, some, transfer
from cankd_hf.errors import InputError
from cankd_hf.json_text import to_json
from cankd_hf.models import register
from cankd_hf.models.dino.configuration_cankd_dino import DINOConfig
from cankd_hf.models.dino.modeling_cankd_dino import DINOForObjectDetection
from cankd_hf.models.fpn.configuration_cankd_fpn import FPNConfig
from cankd_hf.models.fpn.modeling_cankd_fpn import FPNForSemanticSegmentation
from cankd_hf.models.fpn.modeling_cankd_fpn_detection import FPNForObjectDetection
from cankd_hf.models.fpn.modeling_cankd_fpn_instances import FPNForInstanceSegmentation
from cankd_hf.models.weight_files import share
from cankd_hf.tasks import TASKS

RECORD = "conversion.json"
LONG_SIDE = {"image_size": [800, 1333], "keep_aspect": True}  # of MMDetection's images


@dataclass(frozen=True)
class Kind:
    """A kind of model: how it is planned, its class and configuration, and how its images are resized."""

    plan: Callable[[Checkpoint, str], Plan]
    model: type[PreTrainedModel]
    images: dict[str, Any]
    config: Callable[..., Any] = FPNConfig


KINDS = {
    name: Kind(plan, FPNForObjectDetection, LONG_SIDE)
    for name, plan in {
        "retinanet": detectors.retinanet,
        "faster_rcnn": detectors.faster_rcnn,
        "cascade_rcnn": detectors.cascade_rcnn,
        "fcos": dense.fcos,
        "reppoints": dense.reppoints,
    }.items()
} | {
    name: Kind(plan, FPNForSemanticSegmentation, {})
    for name, plan in {"pspnet": segmenters.pspnet, "deeplabv3": segmenters.deeplabv3}.items()
}
KINDS["dino"] = Kind(dino, DINOForObjectDetection, LONG_SIDE, DINOConfig)


def run(options: argparse.Namespace) -> int:
    """Converts a file. Returns the exit code.

    Raises:
        InputError: for a file that cannot be converted exactly, or an output that is in use.
    """
    register()
    out = Path(options.output)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: expected a new or empty folder; name another one")
    made = read_checkpoint(Path(options.file), options.part)
    model, plan = convert(made, options.kind, options.style, options.labels)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    share(out)
    mean, std = ([x / 255 for x in values] for values in plan.pixels)
    data = DataConfig(path="shapes", image_mean=mean, image_std=std, **KINDS[options.kind].images)
    task = next(one for one in TASKS.values() if one.recognises(type(model).__name__))
    task.from_model(model).image_processor(data).save_pretrained(out)
    lines = [*plan.notes, *(f"left out, {kind}: {len(keys)} ({some(sorted(keys), 2)})" for kind, keys in left(made))]
    record = {"file": made.file.name, "sha256": hashlib.sha256(made.file.read_bytes()).hexdigest(), "as": options.kind}
    (out / RECORD).write_text(to_json({**record, "notes": lines}) + "\n", encoding="utf-8")
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.write(f"{out}: {type(model).__name__}, {len(model.state_dict())} tensors, every one from the file\n")
    return 0


def left(made: Checkpoint) -> list[tuple[str, list[str]]]:
    """What of the file is not in the model: kinds and names."""
    return sorted(made.left_out.items())


def convert(made: Checkpoint, kind: str, style: str, labels: str | None) -> tuple[PreTrainedModel, Plan]:
    """Builds the model and fills it with the file's tensors; arguments as of the command.

    Raises:
        InputError: for tensors that are missing, unknown or of another shape, and what cannot be carried exactly.
    """
    made.labels = labels
    plan = KINDS[kind].plan(made, style)
    count = plan.fields.pop("num_labels")
    names, source = class_names(made, count)
    plan.notes.append(f"classes: {count}, {source}")
    label2id = {name: index for index, name in names.items()}
    config = KINDS[kind].config(**plan.fields, id2label=names, label2id=label2id)
    cls = FPNForInstanceSegmentation if plan.fields.get("masks") else KINDS[kind].model
    with torch.random.fork_rng([]):
        model = cls(config).eval()
    model.load_state_dict(transfer(made, plan, model.state_dict()), strict=True)
    return model, plan
