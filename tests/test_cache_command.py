"""`cankd cache`: what it says before, what it writes, and what it finds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from cankd_hf.cache import main
from cankd_hf.cli import train
from cankd_hf.hub.files import read_json

NET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1] * 4,
    "layer_type": "basic",
}


def recipe(folder: Path) -> str:
    """Twelve images, two views, a random teacher."""
    data = {
        "path": "shapes",
        "generated": {"train": 12, "validation": 4, "test": 4, "size": 64},
        "crop_size": [64, 64],
    }
    network = {
        "model_type": "cankd_fpn",
        "num_labels": 6,
        "backbone_config": NET,
        "fpn_channels": 16,
        "head_channels": 16,
    }
    training = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "logging_steps": 3,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    settings = {
        "output_dir": str(folder / "run"),
        "data": {**data, "test_split": None},
        "student": {"backbone": NET, "fpn": {"fpn_channels": 8, "head_channels": 8}},
        "teacher": {"config": network, "cache": {"views": 2, "codec": "int8", "folder": str(folder / "answers")}},
        "distill": {"terms": [{"loss": "instance_mse"}, {"loss": "kl"}]},
        "training": {**training, "eval_strategy": "no", "save_strategy": "no"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return str(folder / "recipe.yaml")


def test_from_the_plan_to_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, answers = recipe(tmp_path), tmp_path / "answers"
    assert main([file, "--plan"]) == 0
    planned = capsys.readouterr().out
    found = re.search(r"teacher: 24 answers of ([\d.]+) MB, .* 0 are there", planned)
    assert found is not None and not answers.exists(), "nothing is written"
    assert main([file, "--check"]) == 2 and "nothing is stored of this teacher" in capsys.readouterr().err
    assert main([file]) == 0
    assert "teacher: 24 answers" in (said := capsys.readouterr().out) and "24 computed and 0 found" in said
    (store,) = answers.iterdir()
    size = sum(one.stat().st_size for one in store.iterdir() if one.is_file())
    assert size == pytest.approx(24e6 * float(found[1]), rel=0.2), "the size was told"
    assert main([file]) == 0 and "0 computed and 24 found" in capsys.readouterr().out
    assert main([file, "--check"]) == 0 and capsys.readouterr().out.count("of 12 (allowed 0.001): as stored") == 5
    assert train.main([file]) == 0
    arm = read_json(tmp_path / "run" / "results.json")["arms"][-1]
    assert (arm["cache"]["teacher"]["hits"], arm["prepaid"].keys()) == (24, {f"teacher cache {store.name[:6]}"})
    assert arm["cache"]["teacher"]["misses"] == 0
    capsys.readouterr()
    assert main([file, "--show"]) == 0
    shown = capsys.readouterr().out
    assert "logits int8" in shown and "24 of 24 in 1" in shown, shown


def test_recipes_without_a_cache_or_with_an_impossible_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = recipe(tmp_path)
    cases = {
        "teacher.cache=null": "teacher.cache: expected a section, got none",
        "teacher.cache.views=0": "teacher.cache.views",
        "teacher.cache.codec=zip": "teacher.cache.codec",
        "teacher.cache.folder=hf://datasets/me/x": "teacher.cache.folder: expected a local folder",
        "data.streaming=true": "a stream does not repeat its pictures",
        "teacher.fit={max_steps: 2}": "teacher.fit: the recipe trains its teacher",
    }
    for override, message in cases.items():
        assert main([file, override, "--plan"]) == 2
        assert message in capsys.readouterr().err.replace(" (command line)", "")
    assert main([file, "teacher.cache.repo=me/answers", "--plan"]) == 2
    assert "teacher.cache.repo: the data set me/answers cannot be read" in capsys.readouterr().err
