"""A recipe with several teachers: each is trained or loaded and scored, and terms learn from theirs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from cankd_hf.cli.dry_run import dry_run
from cankd_hf.cli.report import print_report
from cankd_hf.errors import InputError
from cankd_hf.runs.recipe import load_recipe
from cankd_hf.runs.run import run
from tests.models.kinds import RESNET

DINO = {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56}


def written(folder: Path) -> Path:
    """The recipe: a teacher that is trained first, and one without a head."""
    recipe = {
        "output_dir": str(folder / "run"),
        "baseline": True,
        "data": {
            "path": "shapes",
            "generated": {"train": 8, "validation": 4, "test": 4, "size": 64},
            "crop_size": [64, 64],
            "test_split": "test",
        },
        "student": {"backbone": RESNET, "fpn": {"fpn_channels": 16, "head_channels": 16, "norm": "group"}},
        "teachers": {
            "seg": {
                "config": {"model_type": "cankd_fpn", "backbone_config": RESNET, "fpn_channels": 16, "norm": "group"},
                "fit": {"max_steps": 1},
            },
            "dino": {"config": {**DINO, "patch_size": 14}},
        },
        "distill": {
            "terms": [
                {"loss": "instance_mse", "teacher": "dino", "weight": 1.0},
                {"loss": "cankd", "teacher": "seg", "weight": 1.0},
            ]
        },
        "training": {
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "eval_strategy": "no",
            "save_steps": 1,
            "use_cpu": True,
            "disable_tqdm": True,
        },
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return file


def test_a_run_with_two_teachers(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    recipe = load_recipe(written(tmp_path))
    assert dry_run(recipe) == 0
    shown = capsys.readouterr().out
    assert "seg maps" in shown and "dino maps" in shown and "dino (frozen)" in shown
    report = run(recipe)
    assert [arm.name for arm in report.arms] == ["teacher seg", "student alone", "student distilled"]
    print_report(report)
    assert "teacher seg" in capsys.readouterr().out
    folder = tmp_path / "run"
    manifest = json.loads((folder / "checkpoint-2" / "teacher_manifest.json").read_text())
    assert manifest.keys() == {"seg", "dino"}
    facts = json.loads((folder / "distillation.json").read_text())
    assert facts["teachers"].keys() == {"seg", "dino"}
    assert [(term["loss"], term["teacher"]) for term in facts["terms"]] == [("instance_mse", "dino"), ("cankd", "seg")]
    state = json.loads((folder / "trainer_state.json").read_text())
    assert {"loss_instance_mse", "loss_cankd"} <= state["log_history"][0].keys()
    again = run(recipe)
    assert [arm.scores for arm in again.arms] == [arm.scores for arm in report.arms], "finished arms are kept"


def test_messages_name_the_teacher_and_the_term(tmp_path: Path) -> None:
    recipe = written(tmp_path)
    with pytest.raises(InputError, match=r"^teachers\.dino: .*nowhere"):
        run(load_recipe(recipe, ["teachers.dino.config=null", f"teachers.dino.model={tmp_path}/nowhere"]))
    with pytest.raises(InputError, match=r"^distill\.terms\.0\.name .*term 'values': nn.ModuleDict"):
        load_recipe(recipe, ["distill.terms.0.name=values"])
