"""What was counted in masks is kept until one of them changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cankd_hf.data.layouts import counting

from .folders import coloured, grey, load, pairs


def test_what_was_counted_is_read_again_and_counted_anew_after_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "LONG", -1.0)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    pairs(tmp_path / "set" / "images", tmp_path / "set" / "masks", 3, coloured)
    names = [f"masks/{number:03d}.png" for number in range(3)]
    first = counting.held_by(tmp_path / "set", names, 10**6)
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 1 and len(first.colours) == 3
    monkeypatch.setattr(counting, "_KEPT", {})
    monkeypatch.setattr(counting, "look_at", lambda *_: pytest.fail("decoded again"))
    assert counting.held_by(tmp_path / "set", names, 10**6) == first
    assert counting.held_by(tmp_path / "set", names, 10**6) == first, "in the same process"
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    grey(tmp_path / "set" / "masks" / "000", np.full((32, 40), 7, np.uint8))
    changed = counting.held_by(tmp_path / "set", names, 10**6)
    assert changed.values == {7: 32 * 40} and changed.pictures == 2


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setattr(counting, "LONG", -1.0)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    pairs(tmp_path / "set" / "images", tmp_path / "set" / "masks", 3)
    assert len(load(tmp_path / "set").id2label) == 3


def test_masks_that_do_not_decode_are_left_to_the_check_of_images(tmp_path: Path) -> None:
    pairs(tmp_path / "images", tmp_path / "masks", 8)
    (tmp_path / "masks" / "003.png").write_bytes(b"none")
    data = load(tmp_path, on_error="skip", eval_split=None)
    assert len(data.id2label) == 3 and list(data.facts["skipped"]["files"]) == ["images/003.jpg"]
