"""Results in docs and README from committed records; `python -m tests.comparison_tables` updates them.

`<!-- comparison NAME -->` ... `<!-- end -->` holds the tables of comparisons/NAME.records, `<!-- worth -->` a line for
each budget of every comparison, `<!-- worth ended -->` for those at equal cost that are complete. They are read from
`tables.json`, which `python -m cankd_hf.compare` writes beside the records, also with `--report`: nothing in them is
typed by hand.
`<!-- logged NAME -->` holds those of runs of which only a log was kept, `<!-- again NAME -->` how far the same runs on
two machines differ.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from cankd_hf.compare.records import TABLES_FILE
from cankd_hf.hub import escape
from tests.run_logs import again, logged

ROOT = Path(__file__).resolve().parents[1]
COMPARISONS = ROOT / "comparisons"
LOGS = "camvid_gpu.logs"
NAMED = ("recommended", "default")  # arms that are told of wherever they are


def found(folder: Path = COMPARISONS) -> dict[str, dict[str, Any]]:
    """What the records of each comparison show, by its name."""
    files = sorted(folder.glob(f"*.records/{TABLES_FILE}"))
    return {file.parent.name.removesuffix(".records"): json.loads(file.read_text(encoding="utf-8")) for file in files}


def pages(root: Path = ROOT) -> list[Path]:
    """The pages that may hold results."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def rendered(page: str, known: dict[str, dict[str, Any]]) -> str:
    """A page with its results made anew.

    Raises:
        KeyError: for a comparison without records.
    """

    def fill(match: re.Match[str]) -> str:
        kind, _, name = match[1].partition(" ")
        if kind in ("logged", "again"):
            text = (logged if kind == "logged" else again)(COMPARISONS / LOGS, COMPARISONS / f"{name}.yaml")
        else:
            text = worth(known, name == "ended") if kind == "worth" else known[name]["markdown"].strip()
        return f"<!-- {match[1]} -->\n{text}\n<!-- end -->"

    return re.sub(
        r"<!-- (comparison \w+|(?:logged|again) \w+|worth(?: ended)?) -->\n(?:.*?\n)??<!-- end -->",
        fill,
        page,
        flags=re.DOTALL,
    )


def worth(known: dict[str, dict[str, Any]], ended: bool = False) -> str:
    """A table of what distillation was worth: of each budget the named arms, else the one with the largest gain.

    With `ended` of those alone that are at equal cost and whose runs have all ended.
    """
    lines = ["| comparison, budget | score | alone | arm | difference | claim |", "|---|---|---:|---|---|---|"]
    for name, one in known.items():
        for table in one["tables"] if one["split"] == "test" else []:  # a screening or a learning curve is no worth
            if ended and not table["budget"].startswith("cost of"):
                continue
            lines += [_line(name, one, table, row) for row in _told(table) if not ended or _complete(row)]
    if len(lines) == 2:
        return "No comparison has two seeds of an arm yet."
    return "\n".join(lines)


def _told(table: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a table that are worth a line; of one seed nothing is."""
    rows = [row for row in table["rows"] if row["gain"] is not None and row["gain"]["pairs"] > 1]
    rows = [row for row in rows if row["control"] not in ("untrained teacher", "twin")]
    named = [row for row in rows if row["arm"] in NAMED]
    return named or sorted(rows, key=lambda row: -row["gain"]["mean"])[:1]


def _complete(row: dict[str, Any]) -> bool:
    ended = all(score is not None for score in row["scores"].values())
    return ended and "not complete" not in (row["claim"] or "")


def _line(name: str, one: dict[str, Any], table: dict[str, Any], row: dict[str, Any]) -> str:
    gain, reference = row["gain"], next(other for other in table["rows"] if other["arm"] == table["reference"])
    shared = [reference["scores"][seed] for seed, score in row["scores"].items() if score is not None]
    mean = sum(shared) / len(shared)
    arm = row["arm"] if row["arm"] in NAMED else f"{row['arm']} (the largest of {len(table['rows']) - 1})"
    told = f"{100 * gain['mean']:+.1f} (one seed)"
    if gain["pairs"] > 1:
        told = (
            f"{100 * gain['mean']:+.1f} [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}], {gain['pairs']} seeds"
        )
    claim = row["claim"] or "no claim: a table without a verdict"
    cells = (f"{name}, {table['budget']}", f"{one['split']} {one['metric']}", f"{100 * mean:.1f}", arm, told, claim)
    return f"| {' | '.join(escape.text(cell) for cell in cells)} |"


if __name__ == "__main__":
    for path in pages():
        text = path.read_text(encoding="utf-8")
        path.write_text(rendered(text, found()), encoding="utf-8")
