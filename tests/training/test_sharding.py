"""FSDP2 and DeepSpeed: equal to one process, checkpoints that load, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

from cankd_hf.errors import InputError
from cankd_hf.training.arguments import CanKDConfig
from cankd_hf.training.parallel import check_parallel
from tests.processes import run_two

from .test_commands import recipe
from .tiny_trainers import Images, largest_difference, student, trainer, weights


def run(part: str, folder: Path) -> dict[str, Any]:
    """What two processes found; all that they saved and loaded again must be exact."""
    run_two(Path(__file__).with_name("sharded_processes.py"), folder, part)
    found = json.loads((folder / "found.json").read_text())
    exact = {key: value for key, value in found.items() if key.endswith("STATE_DICT")}
    assert len(exact) == 4 and set(exact.values()) == {0.0}, exact
    return found


def check(folder: Path, found: dict[str, Any]) -> None:
    """The weights and scores of two processes against those of one."""
    one = trainer(folder / "one", Images(24, noisy=True), max_steps=3)
    before, start = one.evaluate(Images(7))["eval_miou"], weights(one)
    one.train()
    ranks = [load_file(folder / f"sgd{rank}.safetensors") for rank in range(2)]
    assert largest_difference(ranks[0], ranks[1]) == 0
    assert largest_difference(start, ranks[0]) > 1e-3, "nothing moved: the test would prove nothing"
    assert largest_difference(weights(one), ranks[0]) < 1e-6
    assert {"raw_cka/s2t0", "branch_share/cankd/s2t0"} <= set(found["measured"])
    assert found.get("before", before) == pytest.approx(before, abs=1e-6)
    assert found["after"] == pytest.approx(one.evaluate(Images(7))["eval_miou"], abs=1e-6)


@pytest.mark.slow
def test_fsdp2_equals_one_process_saves_and_resumes(tmp_path: Path) -> None:
    found = run("fsdp", tmp_path)
    assert found["sharded"] == "FSDPDistiller"
    check(tmp_path, found)


@pytest.mark.slow
def test_fsdp2_with_shards_schedules_bf16_and_what_it_refuses(tmp_path: Path) -> None:
    found = run("rest", tmp_path)
    assert found["warm"][0] == 0 < found["warm"][1] and found["plain"] == 0
    assert found["bf16"] == pytest.approx([10.33, 8.18], abs=0.05)  # those of two processes with DDP
    told = ("set_objective: ", "no NoSuchLayer", "params: expected at least 544", "version: expected 2", "teacher")
    told += ("saved under FSDP, resumed under neither", "saved under neither FSDP nor DeepSpeed, resumed under FSDP")
    for message, words in zip(found["refused"], told, strict=True):
        assert words in message and "\n" not in message, message


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_zero2_equals_one_process_saves_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    found = run("deepspeed", tmp_path)
    assert found["sharded"] is True
    check(tmp_path, found)


@pytest.mark.parametrize("as_file", [False, True])
def test_zero3_is_refused_before_anything_is_built(as_file: bool, tmp_path: Path) -> None:
    config: Any = {"zero_optimization": {"stage": 3}}
    if as_file:
        (tmp_path / "zero3.json").write_text(json.dumps(config))
        config = str(tmp_path / "zero3.json")
    with pytest.raises(InputError, match="ZeRO stage 0, 1 or 2, got 3"):
        CanKDConfig(str(tmp_path), deepspeed=config)


def test_zero3_of_a_launcher_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = CanKDConfig(str(tmp_path), use_cpu=True)
    args.deepspeed_plugin = SimpleNamespace(zero_stage=3)
    with pytest.raises(InputError, match="got 3"):
        check_parallel(args)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    with pytest.raises(InputError, match="got 3"):
        CanKDConfig(str(tmp_path))


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_deepspeed_that_is_not_installed_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="DeepSpeed is not installed"):
        CanKDConfig(str(tmp_path), deepspeed={"zero_optimization": {"stage": 2}})


def test_fsdp_in_one_process_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"training\.fsdp: needs several processes, got one"):
        trainer(tmp_path, fsdp=True)


def test_fsdp_of_a_launcher_that_does_not_shard_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(InputError, match="--fsdp_version 2"):
        trainer(tmp_path)
    monkeypatch.setenv("FSDP_VERSION", "2")
    trainer(tmp_path)
    (line,) = [record.message for record in caplog.records if "FSDP was asked for" in record.message]
    assert "one process with all weights" in line


def test_fsdp_shards_the_students_own_layers_and_no_losses(tmp_path: Path) -> None:
    made = trainer(tmp_path, model=student())
    names = made.distiller._no_split_modules
    assert names and set(names) <= {type(module).__name__ for module in made.student.modules()}


@pytest.mark.slow
def test_the_command_in_two_processes_says_that_a_cpu_does_not_shard_and_ends_well(tmp_path: Path) -> None:
    settings = ["baseline=false", "training.use_cpu=true", "training.fsdp=true"]
    first, second = run_two("-m", "cankd_hf.train", recipe(tmp_path), *settings)
    said = (first.stderr + second.stderr).count("training with DDP, each process with all weights")
    assert said == 2, "once for teacher and student"
    assert "Reached mIoU" in first.stdout
