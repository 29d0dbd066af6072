"""Arguments that cannot be used are refused in one line, before anything is trained, scored or opened."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.tables import is_table_path
from cankd_hf.data.segmentation.load import load_segmentation
from cankd_hf.errors import InputError
from cankd_hf.evaluate import main as evaluate
from cankd_hf.push import main as push
from cankd_hf.tasks.pictures import draw_grid
from cankd_hf.train import main as train
from cankd_hf.training.checkpoint_files import check_folder

QUICKSTART = str(Path(__file__).resolve().parents[1] / "recipes" / "quickstart.yaml")


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_a_checkpoint_to_resume_from_is_looked_at_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    out = tmp_path / "out"
    for resume in (tmp_path / "nowhere", tmp_path):
        assert train([QUICKSTART, f"output_dir={out}", "--resume", str(resume), *more]) == 2
        assert capsys.readouterr().err.startswith("error: --resume: expected the folder of a checkpoint, got ")
    assert not out.exists()


def test_a_folder_is_no_file_for_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate([str(tmp_path), "data.path=shapes", "--json", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: --json: expected a file that can be written, got ")


def test_a_dry_push_refuses_the_names_that_a_push_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert push(["runs/quickstart", "a/b/c", "--dry-run"]) == 2
    assert "a/b/c" in capsys.readouterr().err


def test_an_output_that_is_a_file_is_named_by_its_argument(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="^--output .*: it is not a folder; name another folder$"):
        check_folder(tmp_path / "file", "--output")


def test_settings_without_effect_are_told(caplog: pytest.LogCaptureFixture) -> None:
    data = {"path": "shapes", "generated": {"train": 2, "validation": 1, "test": 1, "size": 32}, "crop_size": [32, 32]}
    load_segmentation(DataConfig(**data))
    assert "no effect" not in caplog.text
    load_segmentation(DataConfig(**data, labels="x.json", num_labels=3, keep_aspect=True))
    assert "no effect with generated images: data.labels, data.num_labels; " in caplog.text
    assert "no effect with masks: data.keep_aspect; " in caplog.text


def test_letters_that_a_font_lacks_are_drawn_without_warnings(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_grid(tmp_path / "a.png", ["image"], [[np.zeros((8, 8, 3))]], [("\u65e5\u672c", "k")], width=100)
    assert (tmp_path / "a.png").stat().st_size


def test_a_table_is_found_in_a_folder_that_changes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert not is_table_path(str(tmp_path))
    (tmp_path / "a" / "x.parquet").touch()
    assert is_table_path(str(tmp_path))
