"""A comparison whose runs take no time: costs and scores are drawn from the recipe of each."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from cankd_hf.compare import origin, records
from cankd_hf.compare.arms import Arm, build_arms
from cankd_hf.compare.execute import RunFailed, complete
from cankd_hf.compare.planning import Planner, Run
from cankd_hf.compare.records import Record, Records
from cankd_hf.compare.settings import read_comparison
from cankd_hf.compare.verdict import Findings, Table, judge
from cankd_hf.config.recipe import Recipe
from cankd_hf.data.common.seeds import derived_seed
from cankd_hf.names import ARM_FILE

RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
RESNET["layer_type"] = "basic"
CLOCKS = ("cpu_seconds", "wall_seconds")
NETWORK = {"model_type": "cankd_fpn", "backbone_config": RESNET, "fpn_channels": 8, "head_channels": 8}
ARMS: dict[str, Any] = {
    "alone": ["teacher=null"],
    "cankd": None,
    "instance_mse": {"distill.terms.0.loss": "instance_mse"},
}


def base(folder: Path, **changes: Any) -> str:
    """Writes the base recipe; returns its file."""
    settings: dict[str, Any] = {
        "task": "segmentation",
        "output_dir": "unused",
        "data": {"path": "shapes", "crop_size": [64, 64], "test_split": "test"},
        "student": {"backbone": RESNET, "fpn": {"fpn_channels": 8, "head_channels": 8}},
        "teacher": {"config": NETWORK},
        "distill": {"terms": [{"loss": "cankd", "weight": 2.5, "warmup": 100.0}]},
        "training": {"max_steps": 1000, "learning_rate": 1e-3, "warmup_steps": 50, "use_cpu": True},
    }
    settings["data"] |= {"generated": {"train": 24, "validation": 6, "test": 8, "size": 64}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base.yaml").write_text(yaml.safe_dump({**settings, **changes}))
    return str(folder / "base.yaml")


def name_of(recipe: Recipe) -> str:
    """What an arm is, read off its recipe: its loss, or alone."""
    terms = recipe.resolved().distill.terms
    return terms[0].loss_name if terms else "alone"


@dataclass
class World:
    """What runs cost and reach, and a list of all that were started.

    Attributes:
        step: seconds of a step by loss, "alone" without one.
        worth: what a loss adds to the score.
        noise: standard deviation of the scores.
        drift: factor of the real cost of a step against the calibrated one, by loss.
        before: seconds spent before each run, by loss.
        kill_at: the number of the run at which the comparison is killed.
        fails: whether a run ends with an error.
    """

    step: dict[str, float] = field(default_factory=lambda: {"alone": 1.0, "cankd": 2.0, "instance_mse": 1.5})
    worth: dict[str, float] = field(default_factory=dict)
    noise: float = 0.01
    drift: dict[str, float] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    kill_at: int | None = None
    fails: Callable[[Run], bool] = lambda run: False
    started: list[Run] = field(default_factory=list)

    def run(self, run: Run, place: int) -> Record:
        """A run: its cost is its steps times that of a step, its score a draw by its seed."""
        if len(self.started) == self.kill_at:
            raise KeyboardInterrupt
        self.started.append(run)
        if self.fails(run):
            raise RunFailed("it diverged")
        name, recipe = name_of(run.recipe), run.recipe
        steps = recipe.training["max_steps"]
        step = self.step[name] * self.drift.get(name, 1.0)
        before = self.before.get(name, 0.0)
        cost = before + 5.0 + steps * step
        drawn = random.Random(derived_seed(recipe.seed, name, recipe.training.get("data_seed"), steps))
        score = 0.5 + self.worth.get(name, 0.0) + drawn.gauss(0, self.noise)
        if recipe.named_teachers() and recipe.training.get("learning_rate", 0) > 1e-2:
            score -= 0.3
        spent = {"": cost, "_to_first_step": before + 5.0 + step, "_prepaid": before}
        split = "test" if recipe.data.test_split is not None else "validation"
        return Record(
            run.key,
            run.name,
            {"miou": score},
            "miou",
            True,
            split,
            steps,
            cost,
            {f"{clock}{part}": value for clock in CLOCKS for part, value in spent.items()},
            [{"step": steps, "score": score * part, **dict.fromkeys(CLOCKS, cost * part)} for part in (0.5, 1)],
            prepaid={"teacher cache": dict.fromkeys(CLOCKS, before)} if before else {},
        )

    def calibrate(self, arms: Mapping[str, Arm]) -> dict[str, Any]:
        """Costs of a step without drift."""
        costs = {name: self.step[name_of(arm.recipe)] for name, arm in arms.items()}
        errors = {name: dict.fromkeys(CLOCKS, 0.015) for name in arms}
        made = {name: dict.fromkeys(CLOCKS, cost) for name, cost in costs.items()}
        return {"arms": made, "errors": errors, "start": 1.0}


def planner(
    folder: Path, arms: dict[str, Any] | None = None, changes: dict[str, Any] | None = None, **settings: Any
) -> Planner:
    """The planner of a comparison in a folder, as a fresh start of the command makes it.

    `changes` are those of its base recipe.
    """
    text = {
        "base": base(folder, **(changes or {})),
        "output_dir": str(folder / "out"),
        "arms": ARMS if arms is None else arms,
        "seeds": 3,
        "budgets": [{"steps": 1000}],
        **settings,
    }
    config = read_comparison(yaml.safe_dump(text))
    kept = Records(folder / "out" / "records", folder / "out" / "runs", by_clock=config.clock == "wall")
    return Planner(config, build_arms(config, kept), kept)


def compared(made: Planner, world: World, jobs: int = 1) -> Findings:
    """Runs a comparison to its end."""
    made.sweep()
    if made.unfinished and not made.calibration:
        made.calibration = world.calibrate({name: arm for name, arm in made.arms.items() if not arm.follows})

    def start(run: Run, place: int) -> Record:
        record = world.run(run, place)
        folder = made.records.runs / run.key  # where a teacher would be
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ARM_FILE).touch()
        settings = records._counting(run.recipe)
        kept: dict[str, Any] = {"recipe": made.records.recipe_key(run.recipe), "code": origin.code_hash()}
        kept |= {"settings": settings, "contents": made.records._contents(settings)}
        return replace(record, **kept, by_clock=made.records.by_clock)

    complete(made, start, jobs, lambda line: None)
    made.sweep()
    return judge(made)


def rows(table: Table) -> dict[str, Any]:
    """The rows of a table by arm."""
    return {row.arm: row for row in table.rows}
