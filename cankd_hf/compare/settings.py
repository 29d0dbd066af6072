"""The YAML of a comparison: base recipe, arms, seeds, budgets, tuning, verdict."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Len, Lt

from cankd_hf.config.advice import Say, not_one_of
from cankd_hf.config.reading import read_text
from cankd_hf.config.schema import Problems, Section
from cankd_hf.config.shipped import find_shipped
from cankd_hf.config.yaml_source import YamlSource
from cankd_hf.errors import InputError

Positive = Annotated[float, Gt(0), Say(fix="write numbers above 0")]
Seed = Annotated[int, Ge(0), Le(2**32 - 1)]
# Settings that all arms share, or that the comparison itself decides: what an arm may not set, and why.
_SHARED = "all arms of a comparison see the same images and are scored on the same ones; set it under `recipe:`"
_DECIDED = "the budget decides how long each arm trains; set it under `budgets:`, or for all arms under `recipe:`"
_OF_TRAINING = ("data.train_split", "data.max_train_samples")
RESERVED = {
    **dict.fromkeys(
        ("data.path", "data.name", "data.revision", "data.train_split", "data.eval_split", "data.test_split")
        + ("data.max_train_samples", "data.max_eval_samples", "data.annotations", "data.generated", "data.holdout"),
        _SHARED,
    ),
    **dict.fromkeys(("training.max_steps", "training.num_train_epochs"), _DECIDED),
    **dict.fromkeys(("seed", "training.data_seed"), "arms are paired by their seeds; set them under `seeds:`"),
    "task": "arms of one comparison have one task and one score; compare others in another file",
    "output_dir": "each run has its own folder in that of the comparison; leave it out",
    "hub": "runs of a comparison are not pushed; leave it out",
    "baseline": "the student alone is an arm of its own (teacher=null); leave it out",
}


@dataclass
class BudgetConfig(Section):
    """One budget: how long every arm may train.

    Attributes:
        steps: equal steps: the number of optimizer steps of every arm.
        cost: equal cost: the arm whose cost, at its own number of steps, all others may spend.
        at: with `cost`: another number of steps of that arm than that of the recipe, for a shorter or longer budget.
        prices: with `cost`: a file that `--calibrate` wrote. Costs are then steps times what a step of each arm cost
            there, and no run is measured: for runs that share a device. Default: what each run really spends.
        arms: only these arms have this budget, beside the reference and the controls of them; default: all.
    """

    place: ClassVar[str] = "budgets.0"
    one_of: ClassVar[tuple[str, ...]] = ("steps", "cost")

    steps: Annotated[int, Ge(1)] | None = None
    cost: str | None = None
    at: Annotated[int, Ge(1)] | None = None
    prices: str | None = None
    arms: Annotated[list[str], Len(1)] | None = None

    @property
    def label(self) -> str:
        """Its name in tables."""
        if self.steps is not None:
            return f"{self.steps} steps"
        made = f"cost of {self.cost}" if self.at is None else f"cost of {self.at} steps of {self.cost}"
        return made if self.prices is None else f"{made}, priced"

    @property
    def measured(self) -> bool:
        """Whether what its runs spend counts."""
        return self.cost is not None and self.prices is None

    def problems(self) -> Iterator[tuple[str, str]]:
        """Steps, or prices, of an arm whose cost is no budget."""
        if self.prices is not None and self.cost is None:
            yield "prices", "are for the cost of an arm, and there is none; write cost, or leave them out"
        if self.at is not None and self.cost is None:
            yield "at", "is the number of steps of the arm in `cost`, and there is none; write steps"


@dataclass
class TuningConfig(Section):
    """Tuning of every arm on a part of the training split, with the same number of trials for each.

    Attributes:
        learning_rate: learning rates to try.
        weight: factors of the weights of an arm's own terms to try. An arm that does not distil has as many trials:
            learning rates evenly spread, by their logarithm, between the smallest and the largest; around a single
            one, between its half and its double.
        share: part of the training images that the trials are scored on instead of being trained on.
        eval_split: what the trials are scored on instead of such a part, which is drawn at random: whole clips of a
            video, say (`train[:62]`). A part of the training split, or a split of its own; not one that is scored in
            the end.
        left_out: part of the training split that trials leave out of all images of an arm, those without labels too;
            default: `eval_split`, or the random part.
        seed: of the trials, and of which images are in that part; 0 is none of the default `seeds`.
        steps: steps of a trial; default: those of the first budget in steps, else the recipe's.
    """

    place: ClassVar[str] = "tuning"

    learning_rate: Annotated[list[Positive], Len(1)]
    weight: Annotated[list[Positive], Len(1)] = field(default_factory=lambda: [1.0])
    share: Annotated[float, Ge(0.01), Le(0.5)] = 0.2
    eval_split: str | None = None
    left_out: str | None = None
    seed: Seed = 0
    steps: Annotated[int, Ge(1)] | None = None

    @property
    def trials(self) -> int:
        """Number of trials of each arm."""
        return len(self.learning_rate) * len(self.weight)

    def problems(self) -> Iterator[tuple[str, str]]:
        """What is left out without anything to be scored on."""
        if self.left_out is not None and self.eval_split is None:
            yield "left_out", "is for trials that are scored on `eval_split`, and there is none; name one"


@dataclass
class ScreenConfig(Section):
    """All arms on the first seeds, the best of them on all.

    Attributes:
        seeds: number of seeds that every arm gets.
        keep: number of arms that get all seeds, beside the reference and the controls.
    """

    place: ClassVar[str] = "screen"

    seeds: Annotated[int, Ge(1)] = 2
    keep: Annotated[int, Ge(1)] = 3


@dataclass
class VerdictConfig(Section):
    """What is claimed, and by which controls.

    Attributes:
        reference: the arm that all others are compared with; default: the first that does not distil.
        threshold: smallest gain worth a claim, in units of the score: an interval must lie beyond it.
        margin: also say of each arm whether it is shown not to hurt: the lower end of its interval must lie above
            minus this; null: not asked.
        equal_cost: add the budget of no distillation at equal cost where no budget is of cost; false: nothing is said
            of equal cost, for runs side by side on one device, whose seconds say nothing.
        twin: the arm that is run twice, with other data order and augmentation; default: the reference.
        untrained: arms that are also run with an untrained teacher; default: every arm that distils and is not
            screened out, the control without block excepted.
    """

    place: ClassVar[str] = "verdict"

    reference: str | None = None
    threshold: Annotated[float, Ge(0)] = 0.0
    margin: Annotated[float, Gt(0)] | None = None
    equal_cost: bool = True
    twin: str | None = None
    untrained: list[str] | None = None


@dataclass(kw_only=True)
class ComparisonConfig(Section):
    """A comparison.

    Attributes:
        base: the recipe that all arms start from.
        output_dir: folder of runs, records and results.
        records: folder of the records of finished runs; default: `records` in `output_dir`.
        recipe: changes of the base recipe for all arms, nested as in a recipe.
        teacher: a recipe that trains the teacher of all arms first; default: that of the base recipe.
        arms: name -> changes of the base recipe: a list of `section.key=value`, or nested as in a recipe; null: none.
        seeds: the seeds, or their number (5: 1 to 5). Runs of one seed have the same initial weights and images.
        budgets: how long arms train; each budget is a table of its own.
        tuning: trials on a part of the training split before anything else; null: none.
        screen: all arms on a few seeds, and the best on all; null: all on all.
        verdict: run the controls and claim what they allow; false: a table without claims.
        charge_teacher: charge the training of the teacher to the arms that learn from it, in budgets of cost.
        tolerance: largest relative difference of a run's real cost from its budget; beyond it it is run again.
        attempts: how often a run is tried at most to meet its budget.
        clock: what costs are measured in on a CPU: `cpu`, seconds of user and system, which other programs on the
            machine hardly change; or `wall`, seconds by the clock, for a machine of one's own: waiting costs too then.
            On a GPU they are always the seconds for which the device was held.
        curve: evaluations during each run, for the learning curves; 0: those of the recipe. They are not charged.
        images: `shared`: all arms train on the same images; `labelled`: on the same images with labels of people, and
            each on those of its own (`data.train_split`) that a teacher labelled (`cankd label`), which is charged;
            `own`: each may name its own, for a learning curve over the number of labels. Nothing is claimed then. All
            are always scored on the same images.
    """

    base: str
    output_dir: str
    records: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    teacher: str | None = None
    arms: Annotated[dict[str, list[str] | dict[str, Any] | None], Len(1)]
    seeds: Annotated[int, Ge(2), Le(1000)] | Annotated[list[Seed], Len(2)] = 5
    budgets: Annotated[list[BudgetConfig], Len(1)]
    tuning: TuningConfig | None = None
    screen: ScreenConfig | None = None
    verdict: bool | VerdictConfig = False
    charge_teacher: bool = False
    tolerance: Annotated[float, Gt(0), Lt(1)] = 0.05
    attempts: Annotated[int, Ge(1), Le(10)] = 3
    clock: Literal["cpu", "wall"] = "cpu"
    curve: Annotated[int, Ge(0), Le(100)] = 4
    images: Literal["shared", "labelled", "own"] = "shared"

    @property
    def all_seeds(self) -> list[int]:
        """The seeds as a list."""
        return list(range(1, self.seeds + 1)) if isinstance(self.seeds, int) else list(self.seeds)

    @property
    def judged(self) -> VerdictConfig | None:
        """What to claim; None without a verdict."""
        if isinstance(self.verdict, bool):
            return VerdictConfig() if self.verdict else None
        return self.verdict

    def problems(self) -> Iterator[tuple[str, str]]:
        """Problems beyond types and ranges: names of arms, seeds twice, what an arm may not set."""
        for key in ("base", "output_dir"):
            if not getattr(self, key).strip():
                yield key, "expected a name, got an empty one; name it"
        for name in self.arms:
            if not name.strip() or len(name) > 60 or name != name.strip() or not name.isprintable():
                yield "arms", f"expected names of at most 60 letters, got {name!r}; rename it"
        if self.tuning is not None:
            for key in ("learning_rate", "weight"):
                values = getattr(self.tuning, key)
                if len(set(values)) < len(values):
                    yield f"tuning.{key}", f"expected each value once, got {values}; two equal trials are one"
        if isinstance(self.seeds, list) and len(set(self.seeds)) < len(self.seeds):
            yield "seeds", f"expected each seed once, got {self.seeds}; two equal runs are one"
        named = [(f"budgets.{index}.cost", budget.cost) for index, budget in enumerate(self.budgets)]
        for index, budget in enumerate(self.budgets):
            named += [(f"budgets.{index}.arms", name) for name in budget.arms or ()]
            if budget.cost is not None and budget.arms is not None and budget.cost not in budget.arms:
                yield f"budgets.{index}.arms", f"expected {budget.cost}, whose cost it is, among them; add it"
        if (judged := self.judged) is not None:
            named += [("verdict.reference", judged.reference), ("verdict.twin", judged.twin)]
            named += [("verdict.untrained", name) for name in judged.untrained or ()]
        for place, wanted in named:
            if wanted is not None and wanted not in self.arms:
                yield place, not_one_of(wanted, list(self.arms))
        labels = [budget.label for budget in self.budgets]
        if len(set(labels)) < len(labels):
            yield "budgets", f"expected each budget once, got {', '.join(labels)}; drop one"
        if self.screen is not None and self.screen.seeds > len(self.all_seeds):
            yield "screen.seeds", f"expected at most the {len(self.all_seeds)} of `seeds`, got {self.screen.seeds}"
        if self.charge_teacher and any(budget.prices is not None for budget in self.budgets):
            yield "charge_teacher", "what training a teacher costs is in no prices; leave one of them out"
        if self.images == "own" and self.judged is not None:
            yield "verdict", "arms that train on other images are not paired, so nothing is claimed; leave it out"
        kept = {key: why for key, why in RESERVED.items() if self.images == "shared" or key not in _OF_TRAINING}
        for name, changes in self.arms.items():
            for key in map(_key, as_overrides(changes)):
                reserved = [told for told in kept if key == told or key.startswith(f"{told}.")]
                reserved += [told for told in kept if told.startswith(f"{key}.")]
                if reserved:
                    yield f"arms.{name}", f"{key} is not for an arm: {RESERVED[reserved[0]]}"


def _key(override: str) -> str:
    return override.partition("=")[0].strip()


def as_overrides(changes: Sequence[str] | Mapping[str, Any] | None) -> list[str]:
    """Changes of a recipe as `section.key=value`; a nested mapping sets each of its values."""
    if not isinstance(changes, Mapping):
        return list(changes or ())
    return [f"{path}={json.dumps(value)}" for path, value in _leaves(changes)]


def _leaves(value: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        inner = f"{path}.{key}" if path else str(key)
        if isinstance(item, Mapping) and item and item.keys() != {"share"}:  # a weight by share is one value
            yield from _leaves(item, inner)
        else:
            yield inner, item


def read_comparison(text: str, overrides: Sequence[str] = (), source: str = "comparison") -> ComparisonConfig:
    """Reads a comparison from YAML, with `key=value` overrides.

    Raises:
        InputError: with every problem, each with its dotted path, file and line.
    """
    given = YamlSource(text, overrides, source)
    problems = Problems(given.place)
    config: ComparisonConfig | None = problems.read(ComparisonConfig, given.read(problems), "")
    if config is not None:
        problems.check(config, "")
    problems.raise_all()
    assert config is not None
    return config


def load_comparison(path: str | Path, overrides: Sequence[str] = ()) -> ComparisonConfig:
    """Reads a comparison from a file, see `read_comparison`.

    Raises:
        InputError: with every problem; also if its base recipe or the teacher's is no file.
    """
    config = read_comparison(read_text(path, "comparison"), overrides, str(path))
    wrong = [
        f"{path}: {key}: expected the file of a recipe, got {place!r}, which is none; paths are relative to the "
        "current folder"
        for key, place in (("base", config.base), ("teacher", config.teacher))
        if place is not None and not find_shipped(place, "recipe").is_file()
    ]
    if wrong:
        raise InputError(wrong)
    return config
