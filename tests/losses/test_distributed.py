"""Two gloo processes: equal Can parameters, and with SyncBatchNorm the arithmetic of one process."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.processes import ROOT, environment

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("two_processes", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("ranks")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(folder / "rendezvous"), str(folder)],
            cwd=ROOT,
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    return {path.stem: torch.load(path) for path in folder.glob("*.pt")}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor], only: str = "", **tolerance: float) -> None:
    assert set(a) == set(b)
    for key in a:
        if only in key and "num_batches" not in key:
            torch.testing.assert_close(a[key], b[key], msg=lambda text, key=key: f"{key}: {text}", **tolerance)


@pytest.mark.parametrize("name", ["sync", "whole", "plain"])
def test_parameters_stay_equal_on_the_ranks(states: dict[str, dict[str, Tensor]], name: str) -> None:
    a, b = states[f"{name}0"], states[f"{name}1"]
    keys = [key for key in a if "running" not in key]
    assert_equal({key: a[key] for key in keys}, {key: b[key] for key in keys}, rtol=0, atol=0)


def test_synchronised_statistics_equal_one_process(states: dict[str, dict[str, Tensor]], script: ModuleType) -> None:
    module = script.model(synchronise=False)
    script.train(module, *script.batch())
    for rank in range(2):
        for form in ("sync", "whole"):
            assert_equal(states[f"{form}{rank}"], module.state_dict(), rtol=1e-9, atol=1e-12)
    assert not torch.equal(states["plain0"]["loss.w.weight"], states["sync0"]["loss.w.weight"])


def test_synchronised_statistics_of_unequal_batches(states: dict[str, dict[str, Tensor]], script: ModuleType) -> None:
    module = script.model(synchronise=False)
    module(*script.batch())
    for rank in range(2):
        assert_equal(states[f"unequal{rank}"], module.state_dict(), only="running", rtol=1e-10, atol=1e-12)
