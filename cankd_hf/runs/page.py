"""`report.html` of a run: the verdict, the scores, the worst images, what is confused with what, and the curves.

One file that holds all it shows; it needs no network and no script.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from cankd_hf import figures
from cankd_hf.config.data import DataConfig
from cankd_hf.config.recipe import Recipe, recipe_to_yaml
from cankd_hf.hub.files import read_json
from cankd_hf.names import REPORT_FILE, STATE_FILE
from cankd_hf.runs.details import confused, order
from cankd_hf.runs.record import Report, write_text
from cankd_hf.tasks import Task
from cankd_hf.tasks.panels import Stats, panels
from cankd_hf.tasks.pictures import as_image, fitted

TEMPLATE = Path(__file__).with_name("report.html")
WORST, OTHERS = 18, 6  # images with the worst scores, and some spread over the others
WIDTH, QUALITY = 240, 80  # of a picture, in pixels, and of its JPEG
SHOWN_CLASSES = 30  # of a confusion matrix


@dataclass
class Page:
    """What the page is made of beside the report.

    Attributes:
        recipe: of the run.
        task: of its models.
        dataset: that they were scored on.
        details: of each arm, see `details_of`.
        models: the arms' models, the teachers last.
        stats: the normalisation of a model's images, where it is not that of the data.
    """

    recipe: Recipe
    task: Task
    dataset: Any
    details: Mapping[str, dict[str, Any]]
    models: Mapping[str, PreTrainedModel]
    stats: Mapping[str, Stats] = field(default_factory=dict)

    @property
    def config(self) -> DataConfig:
        """How the images are read."""
        return self.recipe.data


def write_page(report: Report, page: Page) -> Path:
    """Writes the report of a run into its folder. Returns the file."""
    student, folder = report.arms[-1], Path(report.output_dir)
    histories = {arm.name: _history(Path(arm.folder)) for arm in reversed(report.arms)}
    histories = {name: history for name, history in histories.items() if history or name == student.name}
    scores: dict[str, Mapping[str, Any]] = {arm.name: arm.scores for arm in report.arms}
    keeps_best = bool(page.recipe.training.get("load_best_model_at_end"))
    history, better = histories[student.name], report.greater_is_better
    signs = figures.warning_signs(history, report.metric, scores, better, keeps_best)
    curves = figures.training_curves(histories, report.metric)
    own = page.details.get(student.name, {})
    text = figures.render_page(
        TEMPLATE,
        name=str(folder),
        task=report.task,
        split=report.split,
        source=page.config.path,
        count=len(own["images"]["values"]) if "images" in own else None,
        working=[(arm.name, arm.working["line"]) for arm in report.arms if arm.working.get("verdict")],
        signs=list(dict.fromkeys([*report.findings, *signs])),
        results=_results(report, page.task),
        gap=report.gap_line(),
        student=student.name,
        images=own.get("images"),
        cards=_cards(page, own.get("images"), student.name),
        legend=_legend(page.task),
        confusion=_confusion(own["confusion"]) if "confusion" in own else None,
        curves=None if curves is None else _source(figures.to_png(curves), "png"),
        recipe=recipe_to_yaml(page.recipe),
    )
    write_text(folder / REPORT_FILE, text)
    return folder / REPORT_FILE


def _history(folder: Path) -> list[dict[str, Any]]:
    return list(read_json(folder / STATE_FILE).get("log_history") or []) if folder.is_dir() else []


def _results(report: Report, task: Task) -> list[list[str]]:
    """The result table, its heading first."""
    shown = [name for name in task.metrics if any(name in arm.scores for arm in report.arms)]
    rows = [["model", "parameters", "steps", "seconds", *(task.metrics[name].title for name in shown)]]
    for arm in report.arms:
        spent = [f"{arm.steps:,}", f"{arm.seconds:.0f}"] if arm.steps else ["-", "-"]
        found = [f"{arm.scores[name]:.4f}" if name in arm.scores else "-" for name in shown]
        rows.append([arm.name, f"{arm.parameters:,}", *spent, *found])
    return rows


def _source(content: bytes, kind: str) -> str:
    """A picture for an `img` element."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _jpeg(picture: np.ndarray) -> str:
    """A picture [h, w, 3] as a thumbnail."""
    image = as_image(picture)
    height = max(1, round(WIDTH * image.height / image.width))
    buffer = io.BytesIO()
    fitted(np.asarray(image), (WIDTH, height)).save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return _source(buffer.getvalue(), "jpeg")


def _chosen(page: Page, images: dict[str, Any] | None) -> list[tuple[int, bool]]:
    """The images to show, by number, and whether each is among the worst."""
    if not page.task.pictured or not hasattr(page.dataset, "__len__"):
        return []
    ranked = order(images) if images else list(range(len(page.dataset)))
    worst, rest = (ranked[:WORST], ranked[WORST:]) if images else ([], ranked)
    spread = np.linspace(0, len(rest) - 1, min(OTHERS, len(rest))).astype(int).tolist()
    return [*((index, True) for index in worst), *((rest[place], False) for place in spread)]


def _cards(page: Page, images: dict[str, Any] | None, student: str) -> list[dict[str, Any]]:
    """The pictures of each image that is shown, with the score of each model."""
    settings = (images or {}).get("settings", {})
    names = ["image", "ground truth", *page.models]
    cards = []
    for index, is_worst in _chosen(page, images):
        made = panels(page.task, page.dataset[index], page.models, page.config, page.stats, **settings)
        scores = ["", "", *(_score(page.details.get(name, {}), index) for name in page.models)]
        parts = [
            {"title": name, "source": _jpeg(picture), "caption": caption, "score": score}
            for name, picture, caption, score in zip(names, made.pictures, made.captions, scores, strict=True)
        ]
        name = images["names"][index] if images else str(index)
        score = _score(page.details.get(student, {}), index)
        cards.append({"name": name, "score": score, "worst": is_worst, "parts": parts})
    return cards


def _score(details: dict[str, Any], index: int) -> str:
    values = details.get("images", {}).get("values", [])
    return f"{values[index]:.3f}" if index < len(values) and values[index] is not None else ""


def _legend(task: Task) -> list[tuple[str, str]]:
    from matplotlib.colors import to_hex

    return [(name, to_hex(colour)) for name, colour in task.legend()]


def _confusion(found: dict[str, Any]) -> dict[str, Any]:
    """The matrix as parts of its rows, of the classes with the most truth, and the most frequent confusions."""
    counts = np.array(found["counts"], dtype=np.int64)
    largest = np.sort(np.argsort(-(counts.sum(0) + counts.sum(1)), kind="stable")[:SHOWN_CLASSES])
    totals = counts.sum(1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    names: Sequence[str] = found["names"]
    rows = [
        {
            "name": names[row],
            "total": f"{counts[row].sum():,}",
            "cells": [
                {
                    "share": round(float(shares[row, column]), 3),
                    "count": f"{counts[row, column]:,}",
                    "of": f"{names[row]} taken for {names[column]}",
                    "right": bool(row == column),
                }
                for column in largest
            ],
        }
        for row in largest
    ]
    return {
        "columns": [names[index] for index in largest],
        "rows": rows,
        "left_out": len(names) - len(largest),
        "unit": found["unit"],
        "note": found["note"],
        "most": confused(found),
    }
