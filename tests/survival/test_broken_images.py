"""An image that the checks did not look at stops a run late: its work is kept, the file named, it goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cankd_hf import train
from cankd_hf.data.common.decode import Unusable
from tests.processes import run_two
from tests.training.test_commands import RESNET, recipe

from .test_folders import images

SIZE = {"crop_size": [64, 64], "image_size": [64, 64]}
STUDENT = {"backbone": RESNET, "fpn": {"fpn_channels": 8, "head_channels": 8}}


def run_of(folder: Path, data: Path, **training: object) -> str:
    """A recipe of six steps of one image, that looks at one training image before and saves no checkpoint."""
    folder.mkdir()
    return recipe(
        folder,
        data={"path": str(data), **SIZE, "check": 1},
        teacher=None,
        baseline=False,
        student=STUDENT,
        training={
            **{"max_steps": 6, "per_device_train_batch_size": 1, "eval_strategy": "no", "save_strategy": "no"},
            **{"use_cpu": True, "report_to": "none", "disable_tqdm": True, **training},
        },
    )


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_the_work_is_kept_and_the_mended_run_equals_another(
    workers: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cankd_hf.training.first_batch.LOOKED_AT", 1)
    data = tmp_path / "data"
    images(data)
    assert train.main([run_of(tmp_path / "whole", data, dataloader_num_workers=workers)]) == 0
    broken = data / "train" / "images" / "4.png"
    content = broken.read_bytes()
    broken.write_bytes(b"no image")
    file, out = run_of(tmp_path / "broken", data, dataloader_num_workers=workers), tmp_path / "broken" / "run"
    capsys.readouterr()
    assert train.main([file]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert lines[0].startswith("error: train/images/4.png: expected an image that decodes, got no image format")
    (kept,) = out.glob("checkpoint-*")
    step = int(kept.name.removeprefix("checkpoint-"))
    assert 0 < step < 6
    assert lines[1] == f"error: training stopped after step {step}: {kept} holds all of it; mend the file and resume"
    assert lines[2] == "error: data.on_error=skip leaves such files out"
    broken.write_bytes(content)
    assert train.main([file]) == 0
    assert f"from {kept}" in caplog.text
    one, two = (load_file(tmp_path / name / "run" / "model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_run_goes_on_without_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cankd_hf.training.first_batch.LOOKED_AT", 1)
    images(tmp_path / "data")
    (tmp_path / "data" / "train" / "images" / "4.png").write_bytes(b"no image")
    file = run_of(tmp_path / "here", tmp_path / "data")
    assert train.main([file]) == 2
    assert train.main([file, "data.on_error=skip"]) == 0
    assert "skipped: train/images/4.png" in caplog.text


@pytest.mark.slow
def test_an_image_that_only_the_second_process_meets_can_be_mended(tmp_path: Path) -> None:
    images(tmp_path / "data")
    broken = tmp_path / "data" / "train" / "images" / "4.png"
    content = broken.read_bytes()
    file = run_of(tmp_path / "here", tmp_path / "data", save_strategy="steps", save_steps=1, max_steps=12)
    broken.write_bytes(b"no image")

    def codes(name: str) -> list[str]:
        folder = tmp_path / name
        folder.mkdir()
        run_two(Path(__file__).with_name("two_processes_broken.py"), folder, file, "seed=1")
        return [(folder / f"code{rank}").read_text() for rank in (0, 1)]

    first, second = codes("broken")
    assert first != "0" and second == "2"
    assert [*(tmp_path / "here" / "run").glob("checkpoint-*")], "there is work to go on from"
    broken.write_bytes(content)
    assert codes("mended") == ["0", "0"]


def test_nothing_is_learnt_yet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cankd_hf.training.first_batch.LOOKED_AT", 1)
    images(tmp_path / "data")
    content = {file: file.read_bytes() for file in (tmp_path / "data" / "train" / "images").iterdir()}
    for file in sorted(content)[1:]:
        file.write_bytes(b"no image")
    recipe_file = run_of(tmp_path / "here", tmp_path / "data", max_steps=1)
    assert train.main([recipe_file]) == 2
    assert "error: no step was taken yet; mend the file and start again" in capsys.readouterr().err
    for file, pixels in content.items():
        file.write_bytes(pixels)
    assert train.main([recipe_file]) == 0


def test_words_of_a_loading_process_are_its_own() -> None:
    said = "a.png: expected an image"
    traceback = (
        f'Traceback (most recent call last):\n  File "x.py", line 1\ncankd_hf.data.common.decode.Unusable: {said}'
    )
    text = f"Caught Unusable in DataLoader worker process 0.\nOriginal {traceback}\nanother line\n"
    assert Unusable(text).problems == [said, "another line"]
