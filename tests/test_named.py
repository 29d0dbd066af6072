"""Misspelt names of folders and models are told at once, and a Hub that cannot be reached is not asked for long."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from cankd_hf.__main__ import main
from cankd_hf.cli.starting import check_student, check_teacher
from cankd_hf.config.named import absent, check_named, hint, nearest_place, settle_hub
from cankd_hf.errors import InputError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for folder in ("runs/camvid_teacher", "data/My Cam", "cache/models--facebook--small", "facebook"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "data/.hidden_cam").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_the_nearest_place_is_named(here: Path) -> None:
    assert nearest_place("runs/camvid_techer") == os.path.join("runs", "camvid_teacher")
    assert nearest_place("rusn/CAMVID_TEACHER") == os.path.join("runs", "camvid_teacher")
    assert nearest_place(str(here / "dat/my cam")) == str(here / "data/My Cam")
    assert nearest_place("data/hidden_cam") is None  # what a person hid is no suggestion
    assert nearest_place("runs/other") is None and nearest_place("a\0b") is None
    assert hint("runs/camvid_teacher") == "" and "did you mean 'data/My Cam'" in hint("data/MyCam")


def test_a_name_in_a_folder_of_here_is_no_hub_id(here: Path) -> None:
    assert absent("runs/camvid_teacher") is None and absent("me/model") is None and absent("resnet18") is None
    assert absent("runs/camvid_techer") == "nothing is there; did you mean 'runs/camvid_teacher'?"
    assert "a folder runs here it is not looked for on the Hub" in str(absent("runs/other"))
    assert absent("./runs/x/y") == "nothing is there" and absent("facebook/large") is not None
    assert absent("facebook/small") is None  # the cache of the Hub holds it


def test_a_hub_without_an_address_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def unknown(*address: Any) -> None:
        asked.append(address)
        raise socket.gaierror("no address")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert settle_hub({"HTTPS_PROXY": "http://proxy"}) and not asked and not constants.HF_HUB_OFFLINE
    with pytest.raises(InputError, match="nor in the cache of the Hub, which cannot be reached"):
        check_named("data.path", "me/data", "a folder", cached=True)
    assert asked == [("huggingface.co", 443)] and constants.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1"
    assert not settle_hub({}) and len(asked) == 1
    check_named("checkpoint", "facebook/small", "a folder", cached=True)


@pytest.mark.parametrize(
    "words",
    [
        ("evaluate", "runs/camvid_techer"),
        ("export", "runs/camvid_techer"),
        ("visualize", "runs/camvid_techer"),
        ("push", "runs/camvid_techer", "me/x", "--dry-run"),
        ("label", "runs/camvid_techer", "data/My Cam"),
        ("probe", "runs/camvid_techer", "data/My Cam"),
        ("probe", "runs/camvid_teacher", "data/My Cam", "--beside", "runs/camvid_techer"),
        ("data", "runs/camvid_techer"),
        ("train", "camvid_lite0_seg", "data.path=data/My Cam", "teacher.model=runs/camvid_techer"),
        ("train", "camvid_lite0_seg", "data.path=data/My Cam", "student.backbone=runs/camvid_techer"),
        ("train", "camvid_lite0_seg", "data.path=runs/camvid_techer"),
        ("init", "r.yaml", "--yes", "--data", "runs/camvid_techer"),
    ],
)
def test_every_command_names_what_was_meant(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(list(words)) == 2
    assert "did you mean 'runs/camvid_teacher'?" in capsys.readouterr().err


@pytest.mark.parametrize("check", [check_student, lambda name: check_teacher(name, None)])
def test_init_names_what_was_meant(check: Callable[[str], str]) -> None:
    with pytest.raises(InputError, match="did you mean 'runs/camvid_teacher'"):
        check("runs/camvid_techer")
