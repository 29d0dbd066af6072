"""Records are found by what was run: whatever keys a recipe has got since, and not where anything really differs."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

from cankd_hf.compare import origin, records
from cankd_hf.compare.planning import Planner
from cankd_hf.compare.records import Record, Records
from cankd_hf.config.data import DataConfig
from cankd_hf.config.differing import differing
from cankd_hf.config.recipe import Recipe, settings_that_count
from cankd_hf.errors import InputError
from cankd_hf.runs.recipe import load_recipe

from .fake import World, base, compared, planner

COST = [{"steps": 1000}, {"cost": "cankd"}]
LATER = ("data.strong", "data.unlabelled", "data.soft_targets", "teacher.every", "distill.guard", "phases", "students")


@pytest.fixture
def recipes(tmp_path: Path) -> Any:
    file, kept = base(tmp_path), Records(tmp_path / "records", tmp_path / "runs")

    def key(*changes: str) -> str:
        return kept.recipe_key(load_recipe(file, list(changes)))

    return key


@pytest.mark.parametrize(
    "written",
    [
        "data.flip=0.5",
        "data.scale=[0.5,2.0]",
        "data.strong={images: unlabelled, cutmix_area: [0.02,0.4]}",
        "teacher.every=1",
        "distill.terms.0.conditioning=none",
        "distill.guard=null",
        "training.ema=null",
        "training.weight_decay=0.0",
        "seed=42",
    ],
)
def test_a_default_is_the_same_written_or_left_out(written: str, recipes: Any) -> None:
    assert recipes(written) == recipes()


def test_everything_else_is_another_run(recipes: Any) -> None:
    changes = [
        "data.scale=[0.5,1.0]",
        "data.strong.cutmix_area=[0.02,0.5]",
        "data.strong.erase=[0.5]",
        "data.strong.erase=[0.5,0.5]",
        "teacher.cache={views: 2}",
        "teacher.cache={views: 2, codec: exact}",
        "distill.terms.0.weight={share: 0.5}",
        "distill.terms.0.weight=[1.0,2.0,3.0,4.0]",
        "distill.terms=[{loss: cankd}]",
        "distill.terms=[{loss: cankd}, {loss: kl}]",
        "distill.guard=true",
        "schedule=joint",
        "schedule=polish",
        "training.ema=auto",
        "training.channels_last=false",  # left open, a run chooses by its device
        "student.fpn={fpn_channels: 8}",
        "teacher=null",
    ]
    assert len({recipes(), *map(recipes, changes)}) == len(changes) + 1


def test_settings_that_no_section_has_any_more_count(recipes: Any) -> None:
    assert differing({"data.flip": 0.5, "data.gone": 1, "nothing.there": 2}) == {"data.gone": 1, "nothing.there": 2}


def _as_before(folder: Path, without: tuple[str, ...] = LATER) -> None:
    """Rewrites records as an earlier version wrote them: without later settings, a key of all that it had."""
    kept = Records(folder, folder.parent / "runs")
    for file in folder.glob("?" * 16 + ".json"):
        saved = json.loads(file.read_text())
        settings = {key: value for key, value in saved["settings"].items() if not key.startswith(without)}
        there = kept._contents(settings)
        saved |= {"settings": settings, "recipe": records._hashed({**settings, **there}), "code": "before"}
        for key in ("contents", "working", "prepaid", "task_loss", "shares", "beside"):
            del saved[key]
        file.unlink()
        (folder / f"{records._hashed(saved['key'])}.json").write_text(json.dumps(saved))


def _made(folder: Path, model: Path, any_code: bool, **settings: Any) -> Planner:
    teacher = {"model": str(model), "config": None}
    made = planner(folder, budgets=COST, recipe={"teacher": teacher}, **settings)
    made.records.any_code = any_code
    return made


def test_records_of_before_are_found_and_what_changed_since_is_not(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    first = compared(_made(tmp_path, model, False), World(drift={"alone": 1.2}))
    folder = tmp_path / "out" / "records"
    _as_before(folder)
    (folder / "schedule.json").unlink()  # it went by the keys of before: the names of the runs tell their steps
    world = World()
    again = compared(_made(tmp_path, model, True), world)
    assert not world.started
    for one, other in zip(first.tables, again.tables, strict=True):
        assert [row.scores for row in one.rows] == [row.scores for row in other.rows]
        assert [row.steps for row in one.rows] == [row.steps for row in other.rows]
    strict = _made(tmp_path, model, False)
    assert len(strict.sweep()) == 9  # all arms and seeds, as nothing was asked for of other code
    (model / "config.json").write_text('{"another": 1}')
    todo = {run.name for run in _made(tmp_path, model, True).sweep()}
    assert todo == {f"{arm}, 1000 steps, seed {seed}" for arm in ("cankd", "instance_mse") for seed in (1, 2, 3)}


def test_a_record_that_was_edited_is_refused(tmp_path: Path) -> None:
    compared(planner(tmp_path), World())
    file = next(iter(sorted((tmp_path / "out" / "records").glob("?" * 16 + ".json"))))
    saved = json.loads(file.read_text())
    file.write_text(json.dumps({**saved, "settings": {**saved["settings"], "data.flip": 0.25}}))
    with pytest.raises(InputError, match="expected the settings of .*, got others; remove the file"):
        planner(tmp_path).sweep()


def test_every_default_of_a_recipe_is_left_out() -> None:
    recipe = Recipe(output_dir="x", data=DataConfig(), student={"backbone": "y"})  # type: ignore[arg-type]
    left = differing(settings_that_count(asdict(recipe)))
    assert left == {"student.backbone": "y", "data": {}}
    assert "contents" in {one.name for one in fields(Record)}


def test_the_digest_of_the_code_is_that_of_every_python() -> None:
    """Comments, docstrings and empty lines do not count; all else does, and as it is written."""
    first = 'def f(x):  # why\n    """What."""\n\n    # more\n    return f"{x:.2f} # {x!r}"\n'
    second = 'def f(x):\n    """Something\n    else."""\n    return f"{x:.2f} # {x!r}"  # here\n'
    assert origin._bare(first) == origin._bare(second) == 'def f(x):\n    return f"{x:.2f} # {x!r}"'
    assert origin._bare(first) != origin._bare(first.replace("2f", "3f"))
