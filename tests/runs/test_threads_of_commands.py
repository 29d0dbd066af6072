"""Every command that computes takes the threads that find a free core, and says so."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from cankd_hf.host import Host
from cankd_hf.models.fpn.configuration_cankd_fpn import FPNConfig
from tests.models.kinds import RESNET

COMMANDS = {
    "cankd_hf.export": ["{}"],
    "cankd_hf.label": ["{}", "{}"],
    "cankd_hf.probe": ["{}", "shapes"],
    "cankd_hf.visualize": ["{}"],
}


@pytest.fixture
def busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a student without weights, on a machine whose cores others use, where torch would take four."""
    FPNConfig(backbone_config=RESNET, architectures=["FPNForSemanticSegmentation"]).save_pretrained(tmp_path / "run")
    chosen = [4]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: chosen[-1])
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    for name in COMMANDS:
        monkeypatch.setattr(importlib.import_module(name), "read_host", lambda: Host(4, others=4.0))
    return tmp_path / "run"


@pytest.mark.parametrize("name", COMMANDS)
def test_it_takes_the_threads_that_are_left(name: str, busy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert importlib.import_module(name).main([word.format(busy) for word in COMMANDS[name]]) == 2  # has no weights
    printed = capsys.readouterr()
    assert "threads: 1 (4 usable cores, 4.0 in use by other programs; " in printed.out
    assert torch.get_num_threads() == 1


def test_export_takes_the_number_it_is_given(busy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cankd_hf.export import main

    assert main([str(busy), "--threads", "3"]) == 2
    assert "threads: 3 (--threads 3)\n" in capsys.readouterr().out and torch.get_num_threads() == 3
