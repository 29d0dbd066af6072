"""The output folder: what cannot be written to, is held, or holds something else, is told before any training."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from PIL import Image

from cankd_hf import train
from cankd_hf.errors import InputError
from cankd_hf.runs.folder import holds_work
from cankd_hf.runs.recipe import load_recipe
from cankd_hf.training.arguments import CanKDConfig
from cankd_hf.training.checkpoint_files import check_folder
from cankd_hf.training.lock import FolderLock
from tests.training.test_commands import RESNET, recipe


@pytest.mark.parametrize("name", ["file", "file/inside", "x" * 300, "dangling"])
def test_a_folder_that_takes_no_files_is_told_in_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert train.main([recipe(tmp_path), f"output_dir={tmp_path / name}"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: output_dir /") and len(lines[0]) < 400, lines


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="a folder that nobody can write to")
def test_a_read_only_folder_is_told() -> None:
    with pytest.raises(InputError, match="output_dir /proc/self: cannot be written to"):
        check_folder(Path("/proc/self"))


def test_an_empty_name_is_not_the_current_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"output_dir \(.*\): expected a folder"):
        load_recipe(recipe(tmp_path, output_dir=""))
    with pytest.raises(InputError, match="output_dir: expected a folder"):
        CanKDConfig("")


def test_restart_moves_what_a_link_points_to(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    file = recipe(tmp_path, baseline=False, teacher=None)
    assert train.main([file]) == 0
    assert train.main([file, "--restart", "training.max_steps=2"]) == 0
    assert (tmp_path / "run").is_symlink() and (tmp_path / "disk.before1" / "arm.json").is_file()
    assert yaml.safe_load((tmp_path / "disk" / "recipe.yaml").read_text())["training"]["max_steps"] == 2


def test_a_run_that_is_going_on_is_neither_joined_nor_moved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe(tmp_path)
    (tmp_path / "run").mkdir()
    process = os.fork()
    if not process:
        FolderLock(tmp_path / "run").__enter__()
        os.execvp("sleep", ["sleep", "100"])
    try:
        while not (tmp_path / "run" / ".lock").exists():
            pass
        for words in ([file], [file, "--restart"]):
            assert train.main(words) == 2
            assert f"process {process} on" in capsys.readouterr().err
    finally:
        os.kill(process, 9)
        os.waitpid(process, 0)


def images(folder: Path) -> None:
    for split, count in (("train", 6), ("validation", 2)):
        for index in range(count):
            for kind, mode in (("images", "RGB"), ("masks", "L")):
                file = folder / split / kind / f"{index}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new(mode, (64, 64), index % 2 if mode == "L" else (40 * index, 9, 9)).save(file)
        lines = [{"file_name": f"images/{i}.png", "mask_file_name": f"masks/{i}.png"} for i in range(count)]
        (folder / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "labels.json").write_text('{"0": "ground", "1": "thing"}')


def test_a_data_set_that_changed_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    images(data)
    size = {"crop_size": [64, 64], "image_size": [64, 64]}
    student = {"backbone": RESNET, "fpn": {"fpn_channels": 8, "head_channels": 8}}
    file = recipe(tmp_path, data={"path": str(data), **size}, teacher=None, baseline=False, student=student)
    assert train.main([file]) == 0

    def told() -> str:
        assert train.main([file]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert "--restart" in lines[-1]
        return lines[-1]

    capsys.readouterr()
    (data / "labels.json").write_text('{"0": "ground", "1": "other"}')
    assert "classes: ['ground', 'thing'] -> ['ground', 'other']" in told()
    images(data)
    subprocess.run(["cp", str(data / "train/images/0.png"), str(data / "train/images/1.png")], check=True)
    (data / "train/images/1.png").write_bytes((data / "train/images/1.png").read_bytes() + b" " * 100)
    assert "train/images/1.png: " in told()
    images(data)
    (data / "train" / "more.png").write_bytes(b"")
    assert "train/more.png is new" in told()
    (data / "train" / "more.png").unlink()
    assert train.main([file]) == 0
    (data / "labels.json").write_text('{"0": "ground", "1": "other"}')
    assert train.main([file, "--restart"]) == 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and the finished run of it."""
    folder = tmp_path_factory.mktemp("finished")
    assert train.main([recipe(folder, baseline=False, teacher=None)]) == 0
    return folder


def test_a_run_goes_on_where_it_was_moved(finished: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", str(finished / "run"), str(tmp_path / "moved")], check=True)
    (tmp_path / "moved" / "arm.json").unlink()
    assert train.main([str(finished / "recipe.yaml"), f"output_dir={tmp_path / 'moved'}"]) == 0
    made = json.loads((tmp_path / "moved" / "results.json").read_text())
    assert [arm["folder"] for arm in made["arms"]] == [str(tmp_path / "moved")]
    assert made["arms"][0]["steps"] == json.loads((finished / "run" / "results.json").read_text())["arms"][0]["steps"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"name": "student", "files": 1}',
        *(pytest.param(text, marks=pytest.mark.slow) for text in ("[]", "{}", "\0")),
    ],
)
def test_a_damaged_record_of_an_arm_is_made_again(
    content: str, finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", str(finished / "run"), str(run)], check=True)
    whole = (run / "model.safetensors").read_bytes()
    (run / "arm.json").write_text(content)
    assert train.main([str(finished / "recipe.yaml"), f"output_dir={run}"]) == 0
    assert caplog.text.count("arm.json cannot be read") == 1 and (run / "model.safetensors").read_bytes() == whole
    (run / "config.json").unlink()
    assert train.main([str(finished / "recipe.yaml"), f"output_dir={run}"]) == 0
    assert "config.json is missing or changed; made again" in caplog.text and (run / "config.json").is_file()


def test_a_checkpoint_that_was_not_in_place_yet_is_work_too(finished: Path, tmp_path: Path) -> None:
    """Else a run of another recipe would go on from it."""
    partial = tmp_path / "run" / "teacher" / ".partial" / "checkpoint-3"
    partial.mkdir(parents=True)
    assert not holds_work(tmp_path / "run")
    (partial / "checkpoint_files.json").write_text("{}")
    assert holds_work(tmp_path / "run")


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("part", ["teacher.model", "student.model"])
def test_weights_that_cannot_be_read_are_one_line(
    part: str, file: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged"
    subprocess.run(["cp", "-r", str(finished / "run"), str(damaged)], check=True)
    (damaged / "model.safetensors").unlink()
    (damaged / file).write_bytes(b"abc")
    place, key = part.split(".")
    settings = {"baseline": False, "teacher": None, place: {key: str(damaged)}}
    assert train.main([recipe(tmp_path, **settings)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1 and str(damaged) in lines[0] and "output_dir" not in lines[0], lines
