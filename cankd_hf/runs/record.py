"""Typed records of the results of a run."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cankd_hf.names import ALONE, DISTILLED, TEACHER
from cankd_hf.training.checkpoint_files import writing


@dataclass
class Arm:
    """One trained (or only evaluated) model of a run and its scores."""

    name: str
    folder: str
    scores: dict[str, float] = field(default_factory=dict)
    parameters: int = 0
    steps: int = 0
    seconds: float = 0.0
    inherited: list[str] = field(default_factory=list)


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

    def gap_closed(self) -> float | None:
        """Share of the gap between student alone and best teacher that distillation closed; None where unmeasured."""
        alone, distilled = (self._score(name) for name in (ALONE, DISTILLED))
        teachers = [arm.scores[self.metric] for arm in self.teachers() if self.metric in arm.scores]
        if not teachers or alone is None or distilled is None:
            return None
        teacher = max(teachers) if self.greater_is_better else min(teachers)
        if (teacher <= alone) if self.greater_is_better else (teacher >= alone):
            return None
        return (distilled - alone) / (teacher - alone)

    def teachers(self) -> list[Arm]:
        """The arms that are teachers: `teacher`, or `teacher NAME` of several."""
        return [arm for arm in self.arms if arm.name.split()[0] == TEACHER]

    def _score(self, name: str) -> float | None:
        return next((arm.scores.get(self.metric) for arm in self.arms if arm.name == name), None)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file, see `write_text`."""
    write_text(file, json.dumps(content, indent=2))


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
