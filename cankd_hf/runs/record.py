"""Typed records of the results of a run."""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cankd_hf.json_text import to_json
from cankd_hf.names import ALONE, DISTILLED, TEACHER
from cankd_hf.teachers.health import weak
from cankd_hf.training.checkpoint_files import writing


@dataclass
class Arm:
    """One trained (or only evaluated) model of a run, its scores, and the `CostMeter`'s account of its training."""

    name: str
    folder: str
    scores: dict[str, float] = field(default_factory=dict)
    parameters: int = 0
    steps: int = 0
    seconds: float = 0.0
    inherited: list[str] = field(default_factory=list)
    cost: dict[str, float] = field(default_factory=dict)
    cache: dict[str, Any] = field(default_factory=dict)  # answers of stored teachers that were found and missed
    prepaid: dict[str, dict[str, float]] = field(default_factory=dict)  # what of it was spent before, and on what
    phases: list[dict[str, Any]] = field(default_factory=list)  # its parts, see `runs.phases`
    working: dict[str, Any] = field(default_factory=dict)  # whether its distillation works, see `Verdict`
    ema: dict[str, Any] = field(default_factory=dict)  # with `training.ema`: both validation scores and the choice

    def __post_init__(self) -> None:
        # JSON has null for nan
        self.scores = {name: math.nan if value is None else value for name, value in self.scores.items()}


@dataclass
class Report:
    """The results of a run: all arms in the order of the result table."""

    task: str
    metric: str
    split: str
    arms: list[Arm]
    output_dir: str
    facts: dict[str, Any] = field(default_factory=dict)
    greater_is_better: bool = True
    findings: list[str] = field(default_factory=list)  # what is wrong with the teachers, one sentence each

    def gap_closed(self) -> float | None:
        """Share of the gap between student alone and best teacher that distillation closed; None where unmeasured."""
        alone, distilled = (self._score(name) for name in (ALONE, DISTILLED))
        teachers = [score for arm in self.teachers() if math.isfinite(score := arm.scores.get(self.metric, math.nan))]
        if not teachers or alone is None or distilled is None:
            return None
        teacher = max(teachers) if self.greater_is_better else min(teachers)
        if (teacher <= alone) if self.greater_is_better else (teacher >= alone):
            return None
        return (distilled - alone) / (teacher - alone)

    def gap_line(self) -> str:
        """What distillation brought, in a sentence; empty where nothing can be said."""
        gap = self.gap_closed()
        if gap is not None and gap < 0:
            return "The distilled student is worse than the student alone here: distillation did not help."
        if gap is not None:
            return f"Distillation closed {gap:.0%} of the gap between the student alone and the teacher."
        if self.teachers() and any(arm.name == ALONE for arm in self.arms) and not self.weak_teachers():
            return "The teacher is not better than the student alone here: there is no gap to close."
        return ""

    def teachers(self) -> list[Arm]:
        """The arms that are teachers: `teacher`, or `teacher NAME` of several."""
        return [arm for arm in self.arms if arm.name.split()[0] == TEACHER]

    def weak_teachers(self) -> list[str]:
        """A sentence for each teacher that scores below the student alone, or without one below its student."""
        student = next((name for name in (ALONE, DISTILLED) if self._score(name) is not None), None)
        reached = None if student is None else self._score(student)
        if student is None or reached is None:
            return []
        scores = {arm.name: arm.scores[self.metric] for arm in self.teachers() if self.metric in arm.scores}
        of_student = (self.metric, student, reached, self.greater_is_better)
        return [finding for name, score in scores.items() if (finding := weak(name, score, *of_student))]

    def _score(self, name: str) -> float | None:
        score = next((arm.scores.get(self.metric) for arm in self.arms if arm.name == name), None)
        return score if score is not None and math.isfinite(score) else None


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file, see `write_text`."""
    write_text(file, to_json(content))


def write_text(file: Path, content: str) -> None:
    """Writes a text file aside and renames it into place, so that it is never there in part.

    Raises:
        InputError: if it cannot be written.
    """
    partial = file.with_suffix(".partial")
    with writing(file):
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)


def as_dict(report: Report) -> dict[str, Any]:
    """The report as plain data."""
    return {**vars(report), "arms": [vars(arm) for arm in report.arms]}
