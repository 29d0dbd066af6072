"""Adapted teachers: a head on a bare backbone that is frozen, tuned, or tuned by low-rank adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForSemanticSegmentation, Dinov2Backbone, Dinov2Config, set_seed

from cankd_hf.cli.dry_run import dry_run
from cankd_hf.config.teacher import AdaptConfig, TeacherConfig
from cankd_hf.errors import InputError
from cankd_hf.runs.adapting import targets_in, untrained, with_adapters
from cankd_hf.runs.recipe import load_recipe
from cankd_hf.runs.run import run
from tests.models.kinds import RESNET

ATTENTION = "backbone.encoder.layer.{}.attention.attention.{}.weight"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINOv2 without a head."""
    set_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
    folder = tmp_path_factory.mktemp("bare")
    Dinov2Backbone(config).save_pretrained(folder)
    return folder


def written(folder: Path, bare: Path, adapt: dict[str, Any] | None) -> Path:
    fpn = {"neck": "simple_pyramid", "fpn_channels": 16, "head_channels": 16, "norm": "group"}
    if adapt is not None:
        adapt = {"fpn": fpn, "training": {"max_steps": 3, "learning_rate": 0.01}, **adapt}
    recipe = {
        "output_dir": str(folder / "run"),
        "baseline": False,
        "data": {
            "path": "shapes",
            "generated": {"train": 8, "validation": 2, "test": 2, "size": 56},
            "crop_size": [56, 56],
        },
        "student": {"backbone": RESNET, "fpn": {"fpn_channels": 16, "head_channels": 16, "norm": "group"}},
        "teacher": {"model": str(bare), **({} if adapt is None else {"adapt": adapt})},
        "distill": {"terms": [{"loss": "instance_mse", "weight": 1.0, "pairs": "auto"}]},
        "training": {
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "eval_strategy": "no",
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
        },
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return file


def backbones(folder: Path, bare: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights of the backbone before and after."""
    after = load_file(folder / "run" / "teacher" / "model.safetensors")
    before = load_file(bare / "model.safetensors")
    return {f"backbone.{name}": value for name, value in before.items()}, after


def test_a_head_on_a_frozen_backbone(bare: Path, tmp_path: Path) -> None:
    report = run(load_recipe(written(tmp_path, bare, {})))
    assert [arm.name for arm in report.arms] == ["teacher", "student distilled"]
    before, after = backbones(tmp_path, bare)
    assert before.keys() <= after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    assert any(name.startswith("head.") for name in after)
    raw = run(load_recipe(written(tmp_path, bare, {}), ["teacher.adapt=null", f"output_dir={tmp_path / 'raw'}"]))
    assert [arm.name for arm in raw.arms] == ["student distilled"]


def test_low_rank_adapters_are_merged(bare: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    run(load_recipe(written(tmp_path, bare, {"tune": "lora", "rank": 2, "targets": ["q_proj", "v_proj"]})))
    before, after = backbones(tmp_path, bare)
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {ATTENTION.format(layer, part) for layer in (0, 1) for part in ("query", "value")}
    for name in changed:
        assert torch.linalg.matrix_rank((after[name] - before[name]).double(), rtol=1e-4) <= 2
    AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "run" / "teacher")  # without peft


@pytest.mark.slow
def test_the_whole_backbone(bare: Path, tmp_path: Path) -> None:
    run(load_recipe(written(tmp_path, bare, {"tune": "all"})))
    before, after = backbones(tmp_path, bare)
    assert not torch.equal(before[ATTENTION.format(1, "key")], after[ATTENTION.format(1, "key")])


def test_the_dry_run_shows_the_pyramid(bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run(load_recipe(written(tmp_path, bare, {}))) == 0
    shown = capsys.readouterr().out
    assert "teacher maps" in shown and "neck" in shown.partition("teacher maps")[2].partition("pairs")[0]


def test_what_is_adapted(bare: Path) -> None:
    config = TeacherConfig(
        model=str(bare), adapt=AdaptConfig(fpn={"neck": "simple_pyramid"}, training={"max_steps": 5})
    )
    assert config.fit == {"max_steps": 5} and untrained(config).backbone == str(bare)
    ready = config.fitted("there")
    assert (ready.model, ready.fit, ready.adapt) == ("there", None, None)
    backbone = Dinov2Backbone.from_pretrained(bare)
    assert len(targets_in(backbone, None)) == 8 and len(targets_in(backbone, ["fc1"])) == 2
    with pytest.raises(InputError, match="targets: expected linear layers of Dinov2Backbone, got none; name some of"):
        targets_in(backbone, ["qkv"])
    with pytest.raises(InputError, match="it has no linear layers"):
        targets_in(torch.nn.Conv2d(1, 1, 1), None)


def test_adapters_without_peft_are_one_line(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(InputError, match="pip install peft"):
        with_adapters(Dinov2Backbone.from_pretrained(bare), AdaptConfig(tune="lora"))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("teacher.adapt.rank=4", "counts for tune: lora only"),
        ("teacher.adapt={tune: lora, training: {ema: 0.9}}", "expected no ema with tune: lora"),
        ("teacher.adapt.tune=lorra", "did you mean 'lora'"),
        ("teacher.fit={max_steps: 9}", "expected the settings of adapt.training"),
        ("teacher.adapt.training.max_stepz=9", "max_stepz"),
    ],
)
def test_bad_settings_are_told(override: str, said: str, bare: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        load_recipe(written(tmp_path, bare, {}), [override])
