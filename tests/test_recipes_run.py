"""Every shipped recipe builds and takes a step, with tiny random models and generated images in place of downloads."""

from __future__ import annotations

import json
import re
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from cankd_hf.cli import dry_run
from cankd_hf.config.student import StudentConfig
from cankd_hf.data.generated import SHAPE_CLASSES
from cankd_hf.runs import forecast, measured
from cankd_hf.runs.recipe import load_recipe
from cankd_hf.train import main

from .training.detection_folders import NAMES, write_boxes, write_coco
from .training.native_detector_configs import config, write_tokenizer

RECIPES = sorted((Path(__file__).resolve().parents[1] / "recipes").glob("*.yaml"))
RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
DINOV2 = {"model_type": "dinov2_with_registers", "mlp_ratio": 2, "num_register_tokens": 2, **VIT}
BOXED = ("detection", "instance-segmentation")
# Native detectors on the Hub, by the start of their names.
NATIVE = {"PekingU/rtdetr_": "rt_detr", "IDEA-Research/grounding-dino": "grounding-dino"}


def stand_in(source: Any) -> Any:
    """A tiny model with random weights for a model that a recipe would download."""
    if isinstance(source, dict) and "pretrained" not in source:
        return source
    settings = dict(source) if isinstance(source, dict) else {"pretrained": source}
    name = settings.pop("pretrained")
    if name.startswith("timm/"):
        backbone = "resnet10t" if ".tv_in1k" in name else name.removeprefix("timm/").partition(".")[0]
        return {"model_type": "timm_backbone", "backbone": backbone.replace("resnet101d", "resnet18d"), **settings}
    return {**(DINOV2 if "dinov2" in name else RESNET), **settings}


def stand_in_native(model_type: str, recipe_config: dict[str, Any]) -> dict[str, Any]:
    """A tiny detector of that family, with the switches that its recipe sets."""
    settings = {key: value for key, value in recipe_config.items() if isinstance(value, bool)}
    tiny = {**config(model_type), **settings}
    if settings.get("two_stage"):
        tiny["two_stage_num_proposals"] = 12
    if "backbone_config" in recipe_config:
        tiny["backbone_config"] = stand_in(recipe_config["backbone_config"])
    return tiny


def native_type(name: str) -> str | None:
    """The family of a native detector on the Hub."""
    return next((kind for start, kind in NATIVE.items() if name.startswith(start)), None)


def converted(name: str) -> dict[str, Any]:
    """A tiny model of the kind that a command in the header of a recipe converts to `teachers/NAME`."""
    command = rf"cankd_hf\.convert (\S+) --as (\w+).* teachers/{name}$"
    texts = "\n".join(path.read_text(encoding="utf-8") for path in RECIPES)
    file, kind = re.findall(command, texts, re.MULTILINE)[0]
    fields = {"backbone_config": RESNET, "head": kind, "fpn_channels": 32, "conventions": "openmmlab"}
    return {"model_type": "cankd_fpn", **fields, "masks": "mask" in file}


def trained(name: str) -> StudentConfig:
    """The student of the run that writes `runs/NAME`: of a recipe, or of a command in the header of one."""
    for path in RECIPES:
        text = path.read_text(encoding="utf-8")
        commands = re.findall(rf"recipes/([\w]+\.yaml) (.*output_dir=runs/{name})$", text, re.MULTILINE)
        if f"output_dir: runs/{name}\n" in text:
            commands.append((path.name, ""))
        for file, words in commands:
            needed = ["data.path=/data"] if "path: ???" in text and "data.path" not in words else []
            return load_recipe(path.with_name(file), shlex.split(words) + needed).student
    raise AssertionError(f"no recipe and no command in a header trains runs/{name}")


def stand_in_teacher(model: str) -> dict[str, Any]:
    """The same for a teacher: what the recipe it comes from would have trained, or the foundation model."""
    native = native_type(model)
    if native is not None:
        return stand_in_native(native, {})
    if model.startswith("torchvision/"):
        return {"model_type": "cankd_fpn", "backbone_config": RESNET, "head": "faster_rcnn", "fpn_channels": 32}
    if model.startswith("teachers/"):
        return converted(model.removeprefix("teachers/"))
    if not model.startswith("runs/"):
        return dict(DINOV2)
    student = trained(model.removeprefix("runs/"))
    if student.config is not None:
        return stand_in_native(student.config["model_type"], student.config)
    return {"model_type": "cankd_fpn", "backbone_config": stand_in(student.backbone), **narrow(student.fpn)}


def narrow(fpn: dict[str, Any]) -> dict[str, Any]:
    """Settings of a pyramid, as wide as the smallest that has 32 groups in its norms."""
    return {**fpn, "fpn_channels": min(fpn.get("fpn_channels", 128), 32)}


def small(path: Path, folder: Path) -> list[str]:
    """Overrides that make a recipe small and independent of downloads."""
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    student, detection = recipe["student"], recipe.get("task") in BOXED
    size = [56, 84] if {"dinov2", "two"} & {*path.stem.split("_")} and not detection else [64, 64]
    if detection and "backbone" not in student:
        size = [128, 128]  # a norm over groups of one cell, where strides go up to 64, cannot be
    changes: dict[str, Any] = {
        "output_dir": str(folder),
        "data.path": "shapes",
        "data.generated": {"train": 8, "validation": 2, "test": 2, "size": 64},
        "data.crop_size": None if recipe["data"].get("keep_aspect") else size,
        "data.image_size": size,
        "data.labels": None,
        "data.num_labels": None,
        "training.per_device_train_batch_size": 4 if "unlabelled" in recipe["data"] else 2,
        "training.dataloader_num_workers": 0,
        "training.bf16": False,
        "training.use_cpu": True,
    }
    if "backbone" in student:
        changes |= {"student.backbone": stand_in(student["backbone"]), "student.fpn": narrow(student.get("fpn", {}))}
    elif "config" in student:
        changes["student.config"] = stand_in_native(student["config"]["model_type"], student["config"])
        if "tokenizer" in student:
            changes["student.tokenizer"] = str(write_tokenizer(folder.with_name("tokenizer")))
    else:
        native = native_type(student["model"])
        changes |= {"student.model": None, "student.config": stand_in_native(native, {})}
    if recipe.get("task") == "features":
        del changes["student.fpn"]
    if detection and recipe["data"]["path"] != "shapes":
        splits = {"train": recipe["data"].get("train_split", "train"), "val": recipe["data"]["eval_split"]}
        write = write_boxes if splits["val"] == "validation" else partial(write_coco, splits=splits)
        changes |= {"data.path": str(write(folder.with_name("boxes"))), "data.generated": {}}
    alone = {"teacher": recipe["teacher"]} if recipe.get("teacher") else {}
    several = {f"teachers.{name}": teacher for name, teacher in recipe.get("teachers", {}).items()}
    for place, teacher in (alone | several).items():
        if "model" not in teacher:
            continue
        made = stand_in_teacher(teacher["model"])
        if made["model_type"].startswith("cankd_"):  # trained on the same data
            made["id2label"] = NAMES if detection else SHAPE_CLASSES
        if recipe.get("task") == "classification" or (detection and recipe["data"]["path"] == "shapes"):
            made["id2label"] = {key - 1: name for key, name in SHAPE_CLASSES.items() if key}
        changes |= {f"{place}.model": None, f"{place}.config": made}
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]


PARTS = dict.fromkeys(("alone", "live", "replayed", "teachers", "optimizer", "read", "reread"), [1.0])
MEASURED = ("quickstart", "bccd_det", "dinov2_features", "depth_quickstart")  # those whose plan is really measured


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_builds_and_takes_a_step(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "MOST", 1)
    if path.stem not in MEASURED:
        known = measured.Measured(2, PARTS, {"alone": 1, "live": 1}, {"teacher": 1})
        monkeypatch.setattr(dry_run, "measure", lambda *_: known)
        monkeypatch.setattr(forecast, "measure", lambda *_: known)
    assert main([str(path), *small(path, tmp_path / "out"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "one step of one process" in shown and "this recipe in all" in shown
    assert ("teacher maps" in shown) == ("teacher" in yaml.safe_load(path.read_text(encoding="utf-8")))


def test_the_dinov2_recipes_pair_strides_16_and_32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Levels 2 and 3 of the pyramid, 0 and 1 of the label-free backbone, both with the one level of the ViT."""
    for name, expected in (("dinov2_seg", ["2 0", "3 0"]), ("dinov2_features", ["0 0", "1 0"])):
        path = next(path for path in RECIPES if path.stem == name)
        assert main([str(path), *small(path, tmp_path / name), "data.crop_size=[224,224]", "--dry-run"]) == 0
        lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
        table = lines[lines.index("pairs") : lines.index("parameters")]
        rows = [[cell.strip() for cell in line.split("│")[2:4]] for line in table if "│" in line]
        assert [" ".join(row) for row in rows] == expected
