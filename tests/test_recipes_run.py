"""Every shipped recipe builds and takes a step, with tiny random models and generated images in place of downloads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cankd_hf.train import main

from .training.boxes import write_boxes

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


def stand_in(source: Any) -> Any:
    """A tiny model with random weights for a model that a recipe would download."""
    if isinstance(source, dict) and "pretrained" not in source:
        return source
    settings = dict(source) if isinstance(source, dict) else {"pretrained": source}
    name = settings.pop("pretrained")
    if name.startswith("timm/"):
        backbone = name.removeprefix("timm/").replace("resnet101d", "resnet18d").partition(".")[0]
        return {"model_type": "timm_backbone", "backbone": backbone, **settings}
    return {**(DINOV2 if "dinov2" in name else RESNET), **settings}


def stand_in_teacher(model: str) -> dict[str, Any]:
    """The same for a teacher: what the recipe it comes from would have trained, or the foundation model."""
    if not model.startswith("runs/"):
        return dict(DINOV2)
    trained = yaml.safe_load(
        next(path for path in RECIPES if path.stem == Path(model).name).read_text(encoding="utf-8")
    )
    student = trained["student"]
    return {"model_type": "cankd_fpn", "backbone_config": stand_in(student["backbone"]), **student["fpn"]}


def small(path: Path, folder: Path) -> list[str]:
    """Overrides that make a recipe small and independent of downloads."""
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    size = [64, 64] if "dinov2" not in path.stem else [56, 84]
    changes: dict[str, Any] = {
        "output_dir": str(folder),
        "data.path": "shapes",
        "data.generated": {"train": 8, "validation": 2, "test": 2, "size": 64},
        "data.crop_size": size,
        "data.image_size": size,
        "data.labels": None,
        "data.num_labels": None,
        "student.backbone": stand_in(recipe["student"]["backbone"]),
        "training.per_device_train_batch_size": 2,
        "training.dataloader_num_workers": 0,
        "training.bf16": False,
        "training.use_cpu": True,
    }
    if recipe.get("task") == "detection":
        changes |= {"data.path": str(write_boxes(folder.with_name("boxes"))), "data.generated": {}}
    teacher = recipe.get("teacher")
    if teacher is not None and "model" in teacher:
        changes |= {"teacher.model": None, "teacher.config": stand_in_teacher(teacher["model"])}
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_builds_and_takes_a_step(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(path), *small(path, tmp_path / "out"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "one step of one process" in shown
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
