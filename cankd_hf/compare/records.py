"""Records of finished runs, each found again by what it was made from: the resolved recipe and the code."""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import MISSING, InitVar, asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from cankd_hf.compare.origin import code_hash, machine
from cankd_hf.config.differing import differing
from cankd_hf.config.recipe import Recipe, settings_that_count
from cankd_hf.errors import InputError
from cankd_hf.hub.files import read_json
from cankd_hf.names import ARM_FILE, RESULTS_FILE, STATE_FILE
from cankd_hf.runs.device import Device, choices
from cankd_hf.runs.folder import data_files
from cankd_hf.runs.record import write_json
from cankd_hf.training.arguments import CanKDConfig
from cankd_hf.training.checkpoint_files import digest
from cankd_hf.training.monitoring.cost import CPU, DEVICE, PREPAID, SETUP, WALL
from cankd_hf.training.weighing import GRADIENT_SHARE

_LATER: dict[str, Any] = {"contents": None, "working": "", "prepaid": {}, "task_loss": None}  # of records of before
_LATER |= {"shares": {}, "beside": False}
_SETTINGS = ("config.json", "preprocessor_config.json")  # beside weights
_IMAGES = ("data.path", "data.unlabelled")
SCHEDULE_FILE = "schedule.json"  # steps that runs were given
CALIBRATION_FILE = "calibration.json"  # costs of a step
TABLES_FILE = "tables.json"  # what the records show
_OPEN = choices(Device("cuda", tf32=True), {"bf16": True, "dataloader_num_workers": 1})
_USUAL = {one.name: one.default for one in fields(CanKDConfig) if one.default is not MISSING and one.name not in _OPEN}


def unit_of(costs: Mapping[str, Any], by_clock: bool) -> str:
    """The name of the cost that counts: that of the device where there is one, else of the CPU or of the clock."""
    return DEVICE if DEVICE in costs else WALL if by_clock else CPU


@dataclass
class Record:
    """What is kept of a finished run.

    Attributes:
        key: of its recipe and code, see `Records.key`.
        name: of the run, for people.
        scores: of the last arm, on `split`.
        metric: the score that counts.
        greater_is_better: its direction.
        split: the split that was scored.
        steps: optimizer steps.
        seconds: by the clock.
        cost: what was really spent, see `CostMeter`.
        curve: evaluations during the run: `step`, `score`, and what was spent until then by each clock.
        code: digest of the code.
        machine: where it ran.
        recipe: key of the recipe alone.
        settings: the resolved recipe, by dotted path.
        working: the verdict on its distillation; empty without one.
        contents: what was in the files and folders that `settings` names, by dotted path;
            None for records of before.
        prepaid: what of `cost` was spent before the run, by what it was spent on.
        task_loss: the task's loss in training, over the last quarter of its log; None without one.
        shares: share of the gradient of each term, mean over its log.
        beside: whether other runs shared its device, so that its cost says nothing.
    """

    key: str
    name: str
    scores: dict[str, float | None]
    metric: str
    greater_is_better: bool
    split: str
    steps: int
    seconds: float
    cost: dict[str, float]
    curve: list[dict[str, float]] = field(default_factory=list)
    code: str = ""
    recipe: str = ""
    machine: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    contents: dict[str, str] | None = None
    working: str = ""
    prepaid: dict[str, dict[str, float]] = field(default_factory=dict)
    task_loss: float | None = None
    shares: dict[str, float] = field(default_factory=dict)
    beside: bool = False
    by_clock: InitVar[bool] = False

    def __post_init__(self, by_clock: bool) -> None:
        self._by_clock = by_clock

    @property
    def score(self) -> float | None:
        """The score that counts; None where it could not be computed."""
        found = self.scores.get(self.metric)
        return found if found is not None and math.isfinite(found) else None

    @property
    def validation(self) -> float | None:
        """The score by which a screening may choose: of the last evaluation of the run, so that the test split is not
        looked at; the best one where the run kept the best checkpoint."""
        if self.split != "test":
            return self.score
        scores = [point["score"] for point in self.curve if math.isfinite(point["score"])]
        if self.settings.get("training.load_best_model_at_end"):
            scores.sort(reverse=not self.greater_is_better)
        return scores[-1] if scores else None

    @property
    def made(self) -> str:
        """By what code, where and with which libraries it was made."""
        return " ".join([self.code, *(f"{key} {value}" for key, value in sorted(self.machine.items()))])

    @property
    def unit(self) -> str:
        """The clock that its cost is measured by."""
        return unit_of(self.cost, self._by_clock)

    @property
    def spent(self) -> float:
        """Its cost in seconds of `unit`."""
        return self.cost[self.unit]

    @property
    def setup(self) -> float:
        """The part of its cost until the end of the first step."""
        return self.cost.get(self.unit + SETUP, 0.0)

    @property
    def before(self) -> float:
        """The part of `setup` that was spent before the run: stored teachers, pseudo-labels."""
        return self.cost.get(self.unit + PREPAID, 0.0)

    @property
    def step(self) -> float:
        """The cost of a further step."""
        return (self.spent - self.setup) / (self.steps - 1) if self.steps > 1 else self.spent


class Records:
    """A folder of records, with the steps that runs were given and the costs of a step beside them.

    Args:
        folder: of the records; made when the first is written.
        runs: folder of the runs themselves.
        any_code: also take records of the same recipe that other code made.
        by_clock: costs are those by the clock, not those of the CPU.
        fixed: whether they are only read.
    """

    def __init__(
        self, folder: Path, runs: Path, any_code: bool = False, by_clock: bool = False, fixed: bool = False
    ) -> None:
        self.folder, self.runs, self.any_code, self.by_clock, self.fixed = folder, runs, any_code, by_clock, fixed
        self._found: dict[str, Record] = {}
        self._digests: dict[str, str] = {}
        self.plain: dict[str, str] = {}  # key -> that of its recipe alone

    def key(self, recipe: Recipe) -> str:
        """A key of everything that decides the outcome of a run: the resolved recipe and the code."""
        made, plain = _hashed([self.recipe_key(recipe), code_hash()]), self.recipe_key(recipe)
        self.plain[made] = plain
        return made

    def recipe_key(self, recipe: Recipe) -> str:
        """A key of what a resolved recipe sets otherwise than by default.

        In place of names of local files stands what is in them: names and sizes of data, digests of weights. A teacher
        that the comparison trains itself goes by the key of its recipe.
        """
        return key_of(self.told(recipe))

    def told(self, recipe: Recipe) -> dict[str, Any]:
        """What a recipe sets otherwise than by default, with the contents of files in place of their names."""
        settings = _counting(recipe)
        return _told(settings, self._contents(settings))

    def _contents(self, settings: Mapping[str, Any]) -> dict[str, str]:
        found = {path: self._content(path, value) for path, value in settings.items()}
        return {path: content for path, content in found.items() if content is not None}

    def _content(self, path: str, value: Any) -> str | None:
        """What is at a place that a setting names; None for settings that name none, or one that is not there."""
        path = re.sub(r"^phases\.\d+\.", "", path)
        names = path.split(".")
        of_model = names[0] in ("teacher", "teachers", "student")
        of_model &= names[-1] in ("model", "backbone", "pretrained", "weights")
        if not isinstance(value, str) or not (path in (*_IMAGES, "data.labels") or of_model):
            return None
        place = Path(value)
        if place.parent == self.runs:
            return f"run {self.plain.get(place.name, place.name)}"
        if not place.exists():
            return None
        if value not in self._digests:
            self._digests[value] = _digest(place, path in _IMAGES)
        return self._digests[value]

    @cached_property
    def _all(self) -> list[Record]:
        """All records of the folder; those of the code that made most of them come first."""
        found = [one for file in sorted(self.folder.glob("*.json")) if (one := self._read(file)) is not None]
        count = Counter(one.code for one in found)
        return sorted(found, key=lambda one: (one.code != code_hash(), -count[one.code], one.code, one.key))

    @cached_property
    def _by_recipe(self) -> dict[str, list[Record]]:
        """Records by the key of their recipe, as it is made today from the settings that they hold."""
        found: dict[str, list[Record]] = {}
        for one in self._all:
            found.setdefault(self._recipe_of(one), []).append(one)
        return found

    def _recipe_of(self, record: Record) -> str:
        """The key of a record's recipe.

        Records of before have one of all settings, which a new setting would change, and do not tell the contents of
        files: these count if the old key says that they are what is there now.
        """
        if record.contents is not None:
            return _key_of(record.settings, record.contents)
        there = self._contents(record.settings)
        trained = {one.key: one for one in self._all}
        told = {
            path: f"run {trained[Path(str(value)).name].recipe}"
            for path, value in record.settings.items()
            if (there.get(path) or "").startswith("run ") and Path(str(value)).name in trained
        }
        if _hashed({**record.settings, **there, **told}) != record.recipe:
            return record.recipe
        runs = {path: f"run {self._recipe_of(trained[Path(str(record.settings[path])).name])}" for path in told}
        return _key_of(record.settings, {**there, **runs})

    def find(self, key: str) -> Record | None:
        """The record of a run, if there is one.

        Raises:
            InputError: for a record whose settings are not those of the run that it is named after.
        """
        if key not in self._found:
            recipe, file = self.plain.get(key, ""), self.folder / f"{key}.json"
            found = self._read(file)
            if found is not None and self._recipe_of(found) != recipe:
                raise InputError(f"{file}: expected the settings of {found.name}, got others; remove the file")
            if found is None:
                made = self._by_recipe.get(recipe, [])
                found = next((one for one in made if self.any_code or one.code == code_hash()), None)
            if found is None:
                return None
            self._found[key] = found
        return self._found[key]

    def called(self, name: str) -> Record | None:
        """A record by the name of its run, of whatever settings and code."""
        return next((one for one in self._all if one.name == name), None)

    def _read(self, file: Path) -> Record | None:
        if not file.is_file() or file.name in (SCHEDULE_FILE, CALIBRATION_FILE, TABLES_FILE):
            return None
        saved = {**_LATER, **read_json(file)}
        try:
            return Record(**{one.name: saved[one.name] for one in fields(Record)}, by_clock=self.by_clock)
        except KeyError as error:
            raise InputError(f"{file}: expected the record of a run, found none of {error}; remove the file") from None

    def add(self, record: Record) -> Record:
        """Writes a record, and returns it with the clock that counts."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / f"{record.key}.json", asdict(record))
        self._found[record.key] = replace(record, by_clock=self.by_clock)
        return self._found[record.key]

    def record_of(self, folder: Path, key: str, name: str, recipe: Recipe) -> Record:
        """The record of a run that has ended in this folder."""
        results, arm = read_json(folder / RESULTS_FILE), read_json(folder / ARM_FILE)
        metric = results["metric"]
        log = read_json(folder / STATE_FILE)["log_history"]
        clocks = [name for name in (CPU, DEVICE, WALL) if name in arm["cost"]]
        curve = [
            {"step": entry["step"], "score": entry[f"eval_{metric}"]}
            | {name: entry[f"train_{name}"] for name in clocks}
            for entry in log
            if isinstance(entry.get(f"eval_{metric}"), int | float)
            and all(f"train_{name}" in entry for name in clocks)
        ]
        losses = [
            value for entry in log if isinstance(value := entry.get("loss_task"), float) and math.isfinite(value)
        ]
        return Record(
            key=key,
            name=name,
            scores=arm["scores"],
            metric=metric,
            greater_is_better=results["greater_is_better"],
            split=results["split"],
            steps=arm["steps"],
            seconds=arm["seconds"],
            cost=arm["cost"],
            curve=curve,
            code=code_hash(),
            recipe=self.recipe_key(recipe),
            machine=machine(),
            settings=(settings := _counting(recipe)),
            contents=self._contents(settings),
            working=arm.get("working", {}).get("verdict") or "",
            prepaid=arm.get("prepaid", {}),
            task_loss=fmean(losses[len(losses) * 3 // 4 :]) if losses else None,
            shares=_shares(log),
        )

    def load(self, name: str) -> dict[str, Any]:
        """The schedule or the calibration; empty if there is none."""
        file = self.folder / name
        return dict(read_json(file)) if file.is_file() else {}

    def save(self, name: str, content: dict[str, Any]) -> None:
        """Writes the schedule or the calibration, unless they are only read."""
        if self.fixed:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / name, content)


def _shares(log: list[dict[str, Any]]) -> dict[str, float]:
    """Mean of what a log tells of each term's share of the gradient."""
    found: dict[str, list[float]] = {}
    for entry in log:
        for key, value in entry.items():
            if key.startswith(GRADIENT_SHARE) and isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(key.removeprefix(GRADIENT_SHARE), []).append(float(value))
    return {term: round(fmean(values), 4) for term, values in found.items()}


def _hashed(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _key_of(settings: Mapping[str, Any], contents: Mapping[str, str]) -> str:
    """The key of a recipe: of what differs from the defaults, with contents in place of the names of files."""
    return key_of(_told(settings, contents))


def _told(settings: Mapping[str, Any], contents: Mapping[str, str]) -> dict[str, Any]:
    return {key: contents.get(key, value) for key, value in differing(settings).items()}


def key_of(told: Mapping[str, Any]) -> str:
    """The key of a recipe by what it sets, see `Records.told`."""
    return _hashed({key: value for key, value in told.items() if not _is_usual(key, value)})


def _is_usual(key: str, value: Any) -> bool:
    """Whether a setting of `training` is the default, and not one that a run chooses by its device if left open."""
    section, _, name = key.partition(".")
    return section == "training" and name in _USUAL and value == _USUAL[name]


def _counting(recipe: Recipe) -> dict[str, Any]:
    return settings_that_count(asdict(recipe.resolved()))


def _digest(place: Path, data: bool) -> str:
    if data:
        return f"files {_hashed(data_files(str(place)))}"
    if place.is_file():
        return f"file {digest(place)}"
    told = [
        digest(file)
        for file in sorted(place.iterdir())
        if file.is_file() and (file.name in _SETTINGS or file.suffix in (".safetensors", ".bin", ".pth", ".pt"))
    ]
    return f"weights {_hashed(told)}"
