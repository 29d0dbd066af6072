"""Scores of single images and confusion matrices of a run's models, as plain data and in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cankd_hf.hub.files import read_json
from cankd_hf.names import DETAILS_FILE
from cankd_hf.runs.record import write_json
from cankd_hf.tasks import Task
from cankd_hf.training.evaluation import Details


def details_of(task: Task, details: Details, split: str, dataset: Any) -> dict[str, Any]:
    """What an evaluation kept, as plain data; empty for a task that says nothing of single images.

    Returns:
        `split`; `images`: `score` (its name), `greater_is_better`, `settings`, `names` (of the images) and `values`
        (null for an image without a score), in the order of the data set; `confusion`: `names`, `counts` (truth in
        rows), `unit` and `note`.
    """
    found: dict[str, Any] = {}
    if details.statistics is None:
        return found
    scores = task.image_scores(details.statistics)
    if scores is not None:
        name = getattr(dataset, "name", None)
        values = [round(float(value), 6) for value in scores.values]
        found["images"] = {
            "score": scores.name,
            "greater_is_better": scores.greater_is_better,
            "settings": dict(scores.settings),
            "names": [name(index) if name is not None else str(index) for index in range(len(values))],
            "values": values,
        }
    tally = None if details.tally is None else details.tally.numpy()
    confusion = task.confusion(details.statistics, tally)
    if confusion is not None:
        counts = np.asarray(confusion.counts).tolist()
        found["confusion"] = {**confusion._asdict(), "names": list(confusion.names), "counts": counts}
    return {"split": split, **found} if found else {}


def write_details(folder: Path, found: dict[str, Any]) -> None:
    """Writes the details of a model into its folder."""
    write_json(folder / DETAILS_FILE, found)


def read_details(folder: Path) -> dict[str, Any]:
    """The details of a model that was scored before; empty where there are none."""
    return read_json(folder / DETAILS_FILE) if folder.is_dir() else {}


def order(images: dict[str, Any]) -> list[int]:
    """The images of `details_of` that have a score, the worst first."""
    values = np.array([np.nan if value is None else value for value in images["values"]], dtype=float)
    ranked = np.argsort(values if images["greater_is_better"] else -values, kind="stable")  # nan comes last
    return [int(index) for index in ranked if not np.isnan(values[index])]


def confused(confusion: dict[str, Any], count: int = 10) -> list[tuple[str, str, int, float]]:
    """The most frequent confusions: truth, what it was taken for, how often, and that as a part of the truth."""
    counts, names = np.array(confusion["counts"], dtype=np.int64), confusion["names"]
    totals, wrong = counts.sum(1), counts.copy()
    np.fill_diagonal(wrong, 0)
    places = np.argsort(-wrong, axis=None, kind="stable")[:count]
    pairs = [(int(place // len(counts)), int(place % len(counts))) for place in places]
    return [
        (names[row], names[column], int(wrong[row, column]), float(wrong[row, column] / totals[row]))
        for row, column in pairs
        if wrong[row, column]
    ]
