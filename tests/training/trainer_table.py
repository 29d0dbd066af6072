"""The tables of docs/trainer.md, from trainer_table.yaml; `python -m tests.training.trainer_table` updates them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import yaml
from transformers import Trainer, TrainingArguments

from cankd_hf.config.hub import NO_TOKEN
from cankd_hf.training.arguments import REFUSED

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "trainer.md"
ROWS: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).with_suffix(".yaml")).read_text(encoding="utf-8"))
HEADS = {
    "arguments": "| argument of `Trainer` | here | shown by |",
    "fields": "| field of `TrainingArguments` | here | shown by |",
    "methods": "| method of `Trainer` | argument | here | shown by |",
}


def installed() -> dict[str, dict[str, Any]]:
    """What the installed transformers has, in the form of the table."""
    methods = {
        name: {key: None for key in inspect.signature(method).parameters if key != "self"}
        for name, method in inspect.getmembers(Trainer, inspect.isfunction)
        if not name.startswith("_")
    }
    return {
        "arguments": {key: None for key in inspect.signature(Trainer.__init__).parameters if key != "self"},
        "fields": {field.name: None for field in dataclasses.fields(TrainingArguments) if field.init},
        "methods": methods,
    }


def flat(rows: dict[str, dict[str, Any]]) -> dict[tuple[str, ...], Any]:
    """(table, argument) or (`methods`, method, argument) -> row."""
    found: dict[tuple[str, ...], Any] = {}
    for table in ("arguments", "fields"):
        found.update({(table, name): row for name, row in rows[table].items()})
    for method, arguments in rows["methods"].items():
        found[("methods", method)] = "method"
        found.update({("methods", method, name): row for name, row in arguments.items()})
    return found


def existing_tests() -> dict[str, str]:
    """Every test function and its file."""
    return {
        node.name: str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def shown(name: str, row: Any, known: dict[str, str]) -> str:
    """The last two cells of a row."""
    if isinstance(row, str):
        return f"works | `{Path(known[row]).name}`: {row.removeprefix('test_').replace('_', ' ')} |"
    if "nothing" in row:
        return f"no meaning: {row['nothing']} | |"
    return f"refused: {NO_TOKEN if 'says' in row else REFUSED[name]} | `test_trainer_table.py` |"


def page(text: str) -> str:
    """The page with its tables made anew."""
    known = existing_tests()
    for table, head in HEADS.items():
        lines = [head, re.sub(r"[^|]+", "---", head)]
        for place, row in flat(ROWS).items():
            if place[0] == table and row != "method":
                names = " | ".join(f"`{part}`" for part in place[1:])
                lines.append(f"| {names} | {shown(place[-1], row, known)}")
        mark = f"<!-- table {table} -->"
        start, rest = text.split(mark)
        text = start + mark + "\n" + "\n".join(lines) + "\n<!-- end -->" + rest.split("<!-- end -->", 1)[1]
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
