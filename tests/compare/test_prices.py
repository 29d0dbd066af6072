"""Budgets whose costs are prices: nothing is measured, and no other recipe is paid by them."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cankd_hf.compare import calibrate, command
from cankd_hf.compare.calibrate import StepClock, _before, _errors, _Timed, trimmed_mean
from cankd_hf.compare.estimate import estimate
from cankd_hf.compare.execute import Processes
from cankd_hf.compare.planning import Planner
from cankd_hf.compare.prices import PRECISION, saved
from cankd_hf.compare.report import columns, notes
from cankd_hf.compare.verdict import interval_text
from cankd_hf.errors import InputError
from cankd_hf.teachers.store import Shard, Store

from .fake import CLOCKS, NETWORK, World, base, compared, planner, rows


def priced(
    folder: Path, changes: dict[str, Any] | None = None, before: dict[str, Any] | None = None, **more: Any
) -> Planner:
    """A planner whose one budget is priced, by a file that was made from the same arms."""
    file = folder / "prices.json"
    budget = {"cost": "cankd", "prices": str(file), **more}
    made = planner(folder, changes=changes, budgets=[budget], verdict={"reference": "alone"})
    if not file.exists():
        arms = {name: arm for name, arm in made.arms.items() if not arm.follows}
        measured = {**World().calibrate(arms), "before": before or {}, "failed": {}}
        file.write_text(json.dumps(saved(measured, arms, made.records)))
    return made


def test_steps_are_what_the_cost_of_the_reference_buys_and_no_run_is_measured(tmp_path: Path) -> None:
    made = priced(tmp_path, before={"instance_mse": dict.fromkeys(CLOCKS, 300.0)})
    world = World(drift={"alone": 7.0, "cankd": 0.2}, before={"cankd": 1e6})  # what runs really spend says nothing
    findings = compared(made, world)
    (table,) = findings.tables
    found = rows(table)
    assert table.budget == "cost of cankd, priced"
    assert {name: set(row.steps.values()) for name, row in found.items()} == {
        "cankd": {1000},
        "alone": {2000},
        "alone (twin)": {2000},
        "cankd (untrained teacher)": {1000},
        "instance_mse": {round(1700 / 1.5)},
    }
    assert all(set(row.charged.values()) <= {2000.0, 1999.5} and not row.off for row in found.values())
    assert found["cankd"].tried == len(found["cankd"].steps) == 3
    assert columns(findings, table)[-2] == "CPU s"
    assert found["alone"].curve[-1][1] == 2000.0  # the price of its last step
    said = " ".join(notes(findings, made))
    assert "Before each run" not in said  # what runs spent there is no cost here
    assert "not measured run by run" in said and "instance_mse 300 s" in said
    assert any("at cost of cankd, priced" in line for line in table.said), interval_text(found["cankd"].gain)


def test_other_recipes_and_stores_have_no_price(tmp_path: Path) -> None:
    priced(tmp_path)
    with pytest.raises(InputError, match=r"cankd was priced with another recipe"):
        priced(tmp_path, changes={"student": {"backbone": {"model_type": "resnet", "depths": [2, 1, 1, 1]}}}).sweep()
    file = tmp_path / "prices.json"
    file.unlink()
    stored = {"teacher": {"config": NETWORK, "cache": {"views": 2}}}
    with pytest.raises(
        InputError, match=r"what the store of cankd costs \(teacher.cache.views\).*set teacher.cache.whole"
    ):
        priced(tmp_path, changes=stored).sweep()
    file.unlink()
    assert priced(tmp_path, changes={"teacher": {"config": NETWORK, "cache": {"whole": True}}}).sweep()
    file.unlink()
    with pytest.raises(InputError, match="set teacher.cache.whole"):
        priced(tmp_path, changes=stored).sweep()
    with pytest.raises(InputError, match=r"expected a file, got 'nowhere.json'.*--calibrate nowhere.json"):
        planner(tmp_path, budgets=[{"cost": "cankd", "prices": "nowhere.json"}]).sweep()
    known = json.loads(file.read_text())
    del known["arms"]["alone"]
    file.write_text(json.dumps({**known, "failed": {"alone": "it diverged"}}))
    with pytest.raises(InputError, match=r"alone has no price: it diverged"):
        priced(tmp_path, changes=None).sweep()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"budgets": [{"steps": 10, "prices": "x"}]}, ": are for the cost of an arm"),
        ({"budgets": [{"cost": "cankd", "prices": "x"}], "charge_teacher": True}, ": what training a"),
    ],
)
def test_prices_without_a_cost(settings: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        planner(tmp_path, **settings)
    assert "prices" in str(error.value) and told in str(error.value)


def test_labels_of_a_teacher_are_in_a_price_once() -> None:
    paid = {"prepaid": {"pseudo-labels": {"cpu_seconds": 40.0, "wall_seconds": 90.0}}}
    clock = StepClock()
    clock.costs = [{"cpu_seconds": 1.0, "wall_seconds": 1.0}]
    live: Any = SimpleNamespace(stores_whole_images=False)
    one = _Timed(0.5, live, clock, paid)
    assert _before([one, one]) == {"cpu_seconds": 40.0, "wall_seconds": 90.0}
    assert _before([_Timed(1.0, live, clock, {})]) == {}


def test_answers_for_whole_images_are_in_a_price_once_whatever_was_stored_so_far() -> None:
    clock = StepClock()
    clock.costs = [{"cpu_seconds": 1.0, "wall_seconds": 1.0}]
    store = Store.__new__(Store)
    store.folder, store.header = Path("a"), {"cost": {"cpu_seconds": 3.0, "wall_seconds": 4.0}}
    store._shards = [
        Shard(Path("b"), "", {"cpu_seconds": 0.25, "wall_seconds": 0.5}, True, [0] * 8),
        Shard(Path("c"), "", {"cpu_seconds": 0.75, "wall_seconds": 1.5}, False, [0] * 8),
    ]
    trainer: Any = SimpleNamespace(
        stores_whole_images=True, train_dataset=range(20), answers_each=2, stored={"": SimpleNamespace(store=store)}
    )
    phases = [_Timed(0.5, trainer, clock, {}), _Timed(0.5, trainer, clock, {})]
    assert _before(phases) == {"cpu_seconds": 3.0 + 40 * 0.5, "wall_seconds": 4.0 + 40 * 1.0}


def test_the_first_try_of_a_run_leaves_what_the_calibration_found_to_be_spent_before(tmp_path: Path) -> None:
    world = World(before={"cankd": 500.0})
    made = planner(tmp_path, budgets=[{"cost": "alone", "at": 2000}])
    made.calibration = {**world.calibrate(made.arms), "before": {"cankd": dict.fromkeys(CLOCKS, 500.0)}}
    found = rows(compared(made, world).tables[0])["cankd"]
    assert found.tried == len(found.steps) == 3  # no run was made again
    assert set(found.steps.values()) <= {750, 751}


def test_the_command_writes_prices_and_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base(tmp_path)
    file = tmp_path / "comparison.yaml"
    file.write_text(
        json.dumps(
            {
                "base": str(tmp_path / "base.yaml"),
                "output_dir": str(tmp_path / "out"),
                "arms": {"alone": ["teacher=null"], "cankd": None},
                "seeds": 2,
                "budgets": [{"cost": "cankd", "prices": str(tmp_path / "prices.json")}],
            }
        )
    )
    asked: list[float] = []

    def measured(self: Processes, arms: Any, precision: float, say: Any) -> dict[str, Any]:
        asked.append(precision)
        return {**World().calibrate(arms), "failed": {}}

    monkeypatch.setattr(Processes, "calibrate", measured)
    assert command.main([str(file), "--calibrate", str(tmp_path / "prices.json")]) == 0
    assert "cankd: 2.0000 cpu seconds (± 1.5%)" in capsys.readouterr().out
    assert asked == [PRECISION]
    assert not (tmp_path / "out").exists()
    assert command.main([str(file), "--report"]) == 0  # now they are there
    told = " ".join(capsys.readouterr().out.split())
    assert "cost of cankd, priced" in told and "prices.json, known to 1.5%)" in told


def test_an_interrupted_calibration_says_that_no_prices_were_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(options: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_run", stopped)
    for given, told in (([], "what was finished is kept"), (["--calibrate", "out.json"], "no prices were written")):
        assert command.main(["comparison.yaml", *given]) == 130
        assert f"Interrupted; {told}" in capsys.readouterr().err


def test_a_slow_turn_is_left_out_of_a_step() -> None:
    assert trimmed_mean([1.0, 9.0, 2.0]) == 2.0
    assert trimmed_mean([*[1.0] * 10, *[3.0] * 10, 0.0, 99.0]) == 2.0
    assert trimmed_mean([1.0, 2.0]) == 1.5


def test_the_error_of_a_step_is_that_of_its_phases_together() -> None:
    def timed(share: float, costs: list[float]) -> _Timed:
        clock = StepClock()
        clock.costs = [{"cpu_seconds": cost} for cost in [50.0, *costs]]  # the first turn does not count
        return _Timed(share, cast(Any, None), clock, {})

    assert _errors([timed(1.0, [])]) == {"cpu_seconds": math.inf}
    one = timed(1.0, [0.9, 1.0, 1.1])
    assert _errors([one])["cpu_seconds"] == pytest.approx(0.1 / math.sqrt(3))
    steady = timed(0.5, [3.0, 3.0, 3.0])
    assert _errors([one._replace(share=0.5), steady])["cpu_seconds"] == pytest.approx(0.05 / math.sqrt(3) / 2.0)


@pytest.mark.parametrize(
    ("noise", "precision", "turns"),
    [
        pytest.param(0.0, 0.02, 4, id="quiet: three turns that count"),
        pytest.param(0.2, 0.1, 7, id="until it is known"),
        pytest.param(0.2, 0.001, 41, id="not for ever"),
        pytest.param(0.2, None, 4, id="a plan needs no more"),
    ],
)
def test_prices_are_measured_until_they_are_known(
    noise: float, precision: float | None, turns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    class Trainer:
        stores_whole_images = False

        def __init__(self, name: str) -> None:
            self.name, self.clock = name, StepClock()

        def train(self) -> None:
            step = 1.0 + noise * (-1) ** len(self.clock.costs)
            self.clock.costs.append({"cpu_seconds": step, "wall_seconds": 1.0})
            done.append(self.name)

    def timed(recipe: Any, scratch: Path, steps: int, opened: dict[str, Any]) -> list[_Timed]:
        trainer: Any = Trainer(recipe)
        opened["data"] = (None, None)
        return [_Timed(1.0, trainer, trainer.clock, {})]

    for name, fake in {
        "load_recipe": lambda file: file,
        "_elsewhere": lambda recipe, folders: recipe,
        "_timed": timed,
        "_evaluation": lambda *_: 0.0,
    }.items():
        monkeypatch.setattr(calibrate, name, fake)
    told: list[str] = []
    found = calibrate.calibrate({"a": "a", "b": "b"}, {}, precision=precision, say=told.append)
    assert done == ["a", "b"] * turns
    assert len(told) == turns - 3 and told[-1].startswith(f"turn {turns - 1}: ")
    assert found["arms"]["b"]["cpu_seconds"] == pytest.approx(1.0, abs=noise)
    assert found["errors"]["a"]["cpu_seconds"] <= (precision or 1.0) or turns == 41


def test_what_runs_really_spent_is_told_beside_their_price(tmp_path: Path) -> None:
    made = priced(tmp_path, before={"cankd": dict.fromkeys(CLOCKS, 40.0)})
    world = World(drift={"cankd": 1.5}, before={"cankd": 50.0})
    (told,) = [line for line in notes(compared(made, world), made) if line.startswith("What the runs of")]
    # of 1000 and 2040 steps the first, which is the start's, does not count
    assert "in cpu seconds" in told and "cankd 3047 (2040)" in told and "alone 2039 (2040)" in told


def test_an_arm_outside_of_a_priced_budget_needs_no_price_in_a_plan(tmp_path: Path) -> None:
    priced(tmp_path, arms=["cankd"])
    file = tmp_path / "prices.json"
    known = json.loads(file.read_text())
    del known["arms"]["instance_mse"]
    file.write_text(json.dumps(known))
    budgets = [{"steps": 10}, {"cost": "cankd", "prices": str(file), "arms": ["cankd"]}]
    lines = estimate(planner(tmp_path, budgets=budgets, verdict=False)).lines
    assert any(line.startswith("instance_mse, 10 steps") for line in lines), lines
    assert not any(line.startswith("instance_mse, cost") for line in lines)
