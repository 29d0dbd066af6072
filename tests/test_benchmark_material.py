"""The benchmarks of data, scoring and whole trainers: they run, compare equal results, and refuse what they cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from cankd_hf.benchmark import data, main, scoring, scoring_boxes


def test_data_is_timed_with_masks_and_without(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--images", "2", "--repeats", "1", "--size", "24x32"]) == 0
    said = capsys.readouterr().out
    assert "24x32" in said and "224x224" in said and said.count("ms") >= 4


def test_scoring_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scoring", "--images", "3", "--classes", "4", "--size", "12x16", "--repeats", "1"]) == 0
    assert "8 masks, 12x16, 4 classes" in capsys.readouterr().out


def test_scoring_boxes_is_timed_and_equal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["scoring", "--kind", "boxes", "--images", "3", "--classes", "4", "--repeats", "1"]
    assert main(given) == 0
    assert "3 images, 100 boxes each, 4 classes" in capsys.readouterr().out
    plain = scoring_boxes._plain
    monkeypatch.setattr(scoring_boxes, "_plain", lambda *args: {"ap": plain(*args)["ap"] + 1e-5})
    assert main(given) == 2 and "expected the plain form's scores" in capsys.readouterr().err


@pytest.mark.slow
def test_whole_trainers_are_timed(repo_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quickstart, few = str(repo_root / "recipes/quickstart.yaml"), ["--steps", "3", "--repeats", "1", "--threads", "1"]
    small = ["data.generated.train=2", "training.per_device_train_batch_size=2"]
    assert main(["trainer", quickstart, *small, *few]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("stock Trainer", "ours, no teacher", "ours, cankd", "1.000x"))
    assert main(["trainer", quickstart, "distill.task_weight=0", "baseline=false", "teacher.fit=null", *few]) == 2
    assert "the stock Trainer needs the student's own loss" in capsys.readouterr().err
    assert main(["trainer", quickstart, "--steps", "2", "--repeats", "1", "--threads", "1"]) == 2


def test_results_that_differ_are_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    areas = scoring.segmentation_areas
    monkeypatch.setattr(scoring, "segmentation_areas", lambda *given: areas(*given) + 1)
    assert main(["scoring", "--images", "1", "--size", "8x8", "--repeats", "1"]) == 2
    plain = data._plain
    monkeypatch.setattr(data, "_plain", lambda *given: {key: value + 1 for key, value in plain(*given).items()})
    assert main(["data", "--images", "1", "--size", "24x32", "--repeats", "1"]) == 2
    assert "expected the plain form's counts" in (said := capsys.readouterr().err) and "plain pipeline's" in said


@pytest.mark.parametrize(
    ("given", "place"),
    [(["data", "--size", "3x"], "--size"), (["scoring", "--classes", "0"], "--classes"), (["data", "x"], "data.path")],
)
def test_bad_arguments_are_named(given: list[str], place: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(given) == 2
    assert capsys.readouterr().err.startswith(f"error: {place}: expected")
