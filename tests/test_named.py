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
from cankd_hf.data.common.tables import is_table_path
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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data", "m.zip"], "got the file m.zip; unpack it, and give the folder"),
        (["data", "https://example.com/x.zip"], "no address is fetched: download it"),
        (["data", "phone"], "got phone with 1 .heic, 1 .mp4; save its pictures as JPEG or PNG, take pictures out of"),
        (["data", "~/My Cam"], "nothing is there"),
        (["train", "quickstart.yml"], "did you mean 'quickstart', which comes with the package?"),
        (["train", "camvid_seg", "data.path=data/My Cam"], "train it first: cankd train camvid_lite2_teacher data."),
        (["train", "runs/camvid_teacher"], "it is a run, whose recipe is runs/camvid_teacher/recipe.yaml"),
        (["train", "quickstart", "teacher=none"], "teacher (command line): expected a section of `key: value` lines"),
        (["train", "quickstart", "teacher=none"], "write null to go without"),
        (["evaluate", "data"], "data: expected a saved student, found no config.json"),
        (["evaluate", "m.zip"], "m.zip: expected a saved student, got a file; name its folder"),
        (["export", "m.zip"], "m.zip: expected a saved student, got a file; name its folder"),
        (["visualize", "m.zip"], "m.zip: expected a folder or a Hub id, got a file; name its folder"),
        (["init", "r.yaml", "--yes", "--data", "m.zip", "--task", "flying"], "unpack it"),
    ],
)
def test_what_a_stranger_types(here: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "m.zip").write_bytes(b"PK")
    (here / "runs/camvid_teacher/recipe.yaml").write_text("task: x")
    (here / "phone").mkdir()
    for name in ("a.heic", "b.mp4"):
        (here / "phone" / name).write_bytes(b"x")
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("--task") <= 1


def test_settings_with_dashes_and_versions(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["train", "quickstart", "--data.path", "m"], ["train"]):
        with pytest.raises(SystemExit):
            main(words)
    first, second = capsys.readouterr().err.split("usage:")[1:]
    assert "settings are written as section.key=value, without dashes" in first
    assert second.rstrip().endswith("the following arguments are required: recipe")
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("cankd_hf ")
    assert main(["help"]) == 0 and "usage: cankd COMMAND" in capsys.readouterr().out


def test_a_folder_whose_name_looks_like_a_pattern_is_a_folder(here: Path) -> None:
    (here / "data[1]").mkdir()
    assert absent("data[1]") is None and absent("data[2]") is not None and not is_table_path("data[1]")
    assert is_table_path("data/*.parquet")


@pytest.mark.parametrize("check", [check_student, lambda name: check_teacher(name, None)])
def test_init_names_what_was_meant(check: Callable[[str], str]) -> None:
    with pytest.raises(InputError, match="did you mean 'runs/camvid_teacher'"):
        check("runs/camvid_techer")
