"""The plan of a run: times from measured steps, sizes of checkpoints and caches, in 80 columns."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from rich.console import Console

from cankd_hf import train
from cankd_hf.cli.plan import print_plan, size_text
from cankd_hf.durations import duration
from cankd_hf.host import Host
from cankd_hf.runs import measured
from cankd_hf.runs.forecast import Choice, Forecast, checkpoints, evaluations, summed, whole
from cankd_hf.runs.measured import Measured
from cankd_hf.training.arguments import CanKDConfig
from tests.training.test_commands import recipe


def choice(name: str, step: float, chosen: bool, steps: int = 100, stored: int = 0) -> Choice:
    return Choice(name, step, step * steps, 5.0, 2**30, 2**20 + stored, 0.0, stored, chosen)


def part(names: dict[str, float], chosen: str, steps: int = 100) -> Forecast:
    laps = Measured(16, {"live": [1.0, 1.1, 0.9], "alone": [0.5, 0.5, 0.5]})
    return Forecast([choice(name, step, name == chosen, steps) for name, step in names.items()], laps, steps, [])


def test_times_and_sizes_are_written_as_a_person_reads_them() -> None:
    times = (0.123, 5.04, 45, 119.4, 300, 3600 * 1.5, 3600 * 30, 86400 * 10)
    assert [*map(duration, times)] == ["0.12 s", "5.0 s", "45 s", "119 s", "5.0 min", "90 min", "30 h", "10.0 days"]
    assert (size_text(3 * 2**19), size_text(5 * 2**29)) == ("1.5 MiB", "2.50 GiB")


def test_phases_are_summed_and_a_phase_without_teachers_counts_for_each_choice() -> None:
    first = part({"teacher live": 2.0, "cached, 1 view": 1.0}, "teacher live", 40)
    second = part({"student alone": 0.5}, "student alone", 60)
    found = {one.name: one for one in summed([first, second])}
    assert found.keys() == {"teacher live", "cached, 1 view"}
    assert found["teacher live"].training == 110 and found["cached, 1 view"].training == 70
    total = whole([first, second], {"teacher": choice("training the teacher", 3.0, True)}, baseline=False)
    assert total.training == 110 + 300 and total.scoring == 15


def test_a_baseline_costs_the_student_alone_too() -> None:
    one = part({"student alone": 1.0, "teacher live": 2.0}, "teacher live")
    assert whole([one], {}, baseline=True).training == 300
    assert whole([one], {}, baseline=False).training == 200


def test_evaluations_and_checkpoints_are_those_of_the_trainer(tmp_path: Path) -> None:
    args = CanKDConfig(
        str(tmp_path), eval_strategy="steps", eval_steps=0.25, save_steps=30, save_total_limit=2, use_cpu=True
    )
    assert (evaluations(args, 100, 10), checkpoints(args, 100, 10)) == (4, 3)
    args = CanKDConfig(str(tmp_path), eval_strategy="epoch", save_strategy="epoch", use_cpu=True)
    assert (evaluations(args, 100, 40), checkpoints(args, 100, 40)) == (3, 3)
    assert checkpoints(CanKDConfig(str(tmp_path), save_strategy="no", use_cpu=True), 100, 10) == 0


def test_the_table_fits_80_columns_and_says_what_is_unsure(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    names = {"student alone": 0.123, "teacher live": 12.3, "cached, 1 view": 0.2, "cached, 4 views": 0.2}
    one = part(names, "teacher live", 123_456)
    extra = choice("training the teacher a_long_name", 3.0, True, 10**6)
    host = Host(2, 1.3)
    full = 2**52  # no disk has so much
    total = Choice("this recipe", 12.3, 10.0**6, 10.0**5, 3 * 2**33, full, chosen=True)
    print_plan(Console(width=80), [("", one)], [extra], total, str(tmp_path / "a/b"), host)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    said = " ".join(shown.split())
    assert "> teacher live" in said and "…" not in said and "differ by up to 10%" in said
    assert "other programs used 1.3 of 2 cores" in said and "Warning:" in said and "are needed" in said


@pytest.mark.parametrize("cache", ["views=2", "whole=true"])
def test_a_dry_run_measures_each_choice_and_writes_no_store(
    cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "MOST", 2)
    file = recipe(tmp_path)
    store = tmp_path / "answers"
    words = [f"teacher.cache.{cache}", f"teacher.cache.folder={store}", "training.eval_strategy=epoch"]
    assert train.main([file, *words, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    plan = shown.partition("plan: 3 steps of 4 images")[2]
    found = re.findall(r"^([> ]) ([a-z ]+?(?:, \d views?|, whole images)?) +\d", plan, re.MULTILINE)
    names = {name for _, name in found}
    chosen = {"views=2": "cached, 2 views", "whole=true": "cached, whole images"}[cache]
    assert {"student alone", "teacher live", "cached, 1 view", "cached, whole images", chosen} <= names
    assert [name for mark, name in found if mark == ">"] == [chosen, "training the teacher"]
    assert "data: generated images, masks in shapes: train 16, eval 4, test 4; 6 classes: ground" in shown
    assert not store.exists()
