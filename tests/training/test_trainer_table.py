"""The table of everything that the stock Trainer takes is whole, its tests exist, its refusals are raised."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainingArguments

from cankd_hf.errors import InputError
from cankd_hf.training.arguments import REFUSED, CanKDConfig, as_config
from cankd_hf.training.trainer import CanKDTrainer

from .trainer_table import PAGE, ROWS, existing_tests, flat, installed, page

ROW_KINDS = ({"refused"}, {"refused", "says"}, {"nothing"})
REFUSALS = {name: row for name, row in ROWS["fields"].items() if isinstance(row, dict) and "refused" in row}


def test_the_table_has_all_that_the_installed_trainer_takes() -> None:
    missing = flat(installed()).keys() - flat(ROWS).keys()
    assert not missing, f"say in trainer_table.yaml what becomes of {sorted(missing)}"


def test_every_row_says_something_and_every_named_test_exists() -> None:
    known = existing_tests()
    for place, row in flat(ROWS).items():
        if isinstance(row, str):
            assert row == "method" or row in known, f"{place}: there is no test {row}"
        else:
            assert set(row) in ROW_KINDS, place
            assert "nothing" not in row or len(row["nothing"].split()) >= 5, f"{place}: no reason"


@pytest.mark.parametrize("name", REFUSALS)
def test_what_the_table_calls_refused_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    row = REFUSALS[name]
    says = row.get("says") or REFUSED[name]
    plain: Any = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    setattr(plain, name, row["refused"])
    for make in (lambda: CanKDConfig(str(tmp_path), use_cpu=True, **{name: row["refused"]}), lambda: as_config(plain)):
        with pytest.raises(InputError) as caught:
            make()
        assert any(f"training.{name}: " in line and says in line for line in caught.value.problems)
        assert all("\n" not in line for line in caught.value.problems)


def test_only_what_the_table_calls_refused_is_refused() -> None:
    assert REFUSALS.keys() - {"hub_token"} == REFUSED.keys()


def test_our_methods_take_what_the_stock_methods_take() -> None:
    """Overriding them in a subclass, or calling them by position, works as with the stock Trainer."""
    for name, method in inspect.getmembers(Trainer, inspect.isfunction):
        ours = getattr(CanKDTrainer, name)
        if ours is method or name == "__init__":
            continue
        theirs, own = inspect.signature(method).parameters, inspect.signature(ours).parameters
        takes_all = {kind.kind for kind in own.values()} >= {inspect.Parameter.VAR_POSITIONAL}
        assert list(own)[: len(theirs)] == list(theirs) or takes_all, name


def test_the_page_is_in_step() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text, "run python -m tests.training.trainer_table"
