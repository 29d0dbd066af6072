"""Results in docs and README are those of the committed records, and are made by a command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cankd_hf.compare.records import TABLES_FILE
from cankd_hf.compare.report import write
from tests import run_logs
from tests.comparison_tables import COMPARISONS, found, pages, rendered, worth

from .fake import ARMS, World, compared, planner


def shown(folder: Path, **settings: Any) -> dict[str, dict[str, Any]]:
    """What a comparison leaves beside its records, read again."""
    records = folder / "toy.records"
    made = planner(folder, records=str(records), **settings)
    made.records.folder = records
    write("toy", compared(made, World(worth={"cankd": 0.2}, noise=0.004)), made, folder / "out")
    return found(folder)


def test_pages_hold_what_the_records_show_and_making_them_again_changes_nothing(tmp_path: Path) -> None:
    known = shown(tmp_path, verdict={"threshold": 0.005}, seeds=3)
    page = "a\n\n<!-- comparison toy -->\nbefore\n<!-- end -->\nb\n<!-- worth -->\n<!-- end -->\n"
    once = rendered(page, known)
    assert rendered(once, known) == once and "before\n" not in once and once.startswith("a\n") and "\nb\n" in once
    assert "| cankd |" in once and "- cankd is better than alone at 1000 steps" in once
    assert (
        "| toy, 1000 steps | test miou |" in once and "cankd (the largest of" in once and "3 seeds | better |" in once
    )
    with pytest.raises(KeyError, match="other"):
        rendered("<!-- comparison other -->\n<!-- end -->", known)
    assert worth({}) == "No comparison has two seeds of an arm yet."
    only = "<!-- worth ended -->\n<!-- end -->\n"
    assert "| toy, cost of" in rendered(only, known)
    assert "| toy, 1000 steps |" not in rendered(only, known)  # at equal cost alone
    cut = json.loads(json.dumps(known))
    for row in cut["toy"]["tables"][1]["rows"]:
        row["claim"] = "no claim: not complete"
    assert "| toy," not in rendered(only, cut)
    cut = json.loads(json.dumps(known))
    for row in cut["toy"]["tables"][1]["rows"]:
        row["scores"] |= dict.fromkeys(list(row["scores"])[:1])  # a seed that was not run
    assert "| toy," not in rendered(only, cut)
    assert worth({"toy": {**known["toy"], "split": "validation"}}) == worth({})  # a screening


def test_the_recommended_and_the_default_arm_are_told_whether_they_won_or_lost(tmp_path: Path) -> None:
    arms = {"alone": ["teacher=null"], "default": {"distill.terms.0.loss": "instance_mse"}, "cankd": None}
    text = worth(shown(tmp_path, arms=arms, budgets=[{"steps": 1000}]))
    assert "| default |" in text and "cankd" not in text and "a table without a verdict" in text


def test_a_comparison_without_a_folder_of_records_leaves_no_table_in_it(tmp_path: Path) -> None:
    made = planner(tmp_path, arms=ARMS)
    write("toy", compared(made, World()), made, tmp_path / "out")
    assert not (made.records.folder / TABLES_FILE).exists()


def test_the_committed_pages_are_up_to_date() -> None:
    known = found()
    for path in pages():
        text = path.read_text(encoding="utf-8")
        assert rendered(text, known) == text, f"{path.name}: run python -m tests.comparison_tables"


def test_a_log_is_told_by_arm_and_seed_without_filling_gaps(tmp_path: Path) -> None:
    line = "9 s: camvid_priced: {}, seed {}: {} steps, {}, 5 s ({{}})\n"
    alone, own = [0.30, 0.32, 0.31, 0.30, 0.32], [0.33, 0.35, 0.34, 0.33, 0.35]
    for name, shift in (("first.txt", 0.0), ("second.txt", 0.01)):
        text = "".join(line.format("alone, 400 steps", n + 1, 400, score + shift) for n, score in enumerate(alone))
        text += "".join(line.format("cankd, 400 steps", n + 1, 400, score + shift) for n, score in enumerate(own[:3]))
        text += line.format("cankd, 300 steps", 1, 300, 0.9).replace("camvid_priced", "another")
        (tmp_path / name).write_text(text)
    runs = run_logs.scores_of(tmp_path / "first.txt", "camvid_priced")
    told = run_logs.table("400 steps", runs, ["alone", "cankd"])
    assert "| alone | 400 | 30.0 32.0 31.0 30.0 32.0 | 31.0 |  |  |" in told
    assert r"| cankd | 400 | 33.0 35.0 34.0 - - | 34.0 | +3.0 \[+3.0, +3.0\], 3 seeds |" in told
    cost, twice = "cost of 400 steps of cankd, priced", run_logs.again(tmp_path, Path("camvid_priced.yaml"))
    assert run_logs.of_arm(runs, "cankd", cost) == run_logs.of_arm(runs, "cankd", "400 steps")
    assert not run_logs.of_arm(runs, "alone", cost)
    assert twice.startswith("8 of the runs") and "+1.0 points on average" in twice


@pytest.mark.parametrize("name", found())
def test_every_number_of_a_committed_table_is_that_of_a_committed_record(name: str) -> None:
    folder = COMPARISONS / f"{name}.records"
    for table in found()[name]["tables"]:
        for row in table["rows"]:
            for seed, key in row["runs"].items():
                record = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
                assert (
                    record["scores"][record["metric"]] == row["scores"][seed] and record["steps"] == row["steps"][seed]
                )
