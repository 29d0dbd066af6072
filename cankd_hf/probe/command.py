"""The steps of the command: read the images once for each size, fit and score each model, print a table."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from tqdm.auto import tqdm
from transformers.utils.logging import disable_progress_bar

from cankd_hf.commands import check_file, console
from cankd_hf.config.advice import not_one_of
from cankd_hf.config.data import DataConfig
from cankd_hf.config.reading import load_data_config
from cankd_hf.data.common.folders import described
from cankd_hf.data.common.sources import find_split, settled
from cankd_hf.data.layouts import look
from cankd_hf.errors import InputError
from cankd_hf.host import Host
from cankd_hf.json_text import to_json
from cankd_hf.probe.features import Frozen, batches
from cankd_hf.probe.intervals import interval, resampled
from cankd_hf.probe.kinds import MOST, Probe, probes_for
from cankd_hf.runs.threads import settle_threads
from cankd_hf.tasks import TASKS
from cankd_hf.teachers.load import load_teacher

READ = ("masks", "depths", "classes")  # kinds of labels that a probe reads


@dataclass
class Result:
    """The score of one probe of one model at one size."""

    model: str
    probe: str
    size: list[int]
    stride: float
    channels: int
    train_images: int
    test_images: int
    score: float = np.nan
    low: float = np.nan
    high: float = np.nan
    lower_is_better: bool = False
    beside: dict[str, Any] | None = None  # the first model minus this one: score, low, high
    drawn: np.ndarray | None = field(default=None, repr=False)


def run(options: argparse.Namespace, host: Host) -> int:
    """Probes the models and prints their scores. Returns the exit code.

    Args:
        options: of the command line.
        host: what this process finds.

    Raises:
        InputError: for a model or data that cannot be read, or labels that no probe reads.
    """
    check_file(options.json, "--json")
    console().print(settle_threads(host), soft_wrap=True)
    disable_progress_bar()  # of loading weights
    config = load_data_config(None, [f"data.path={options.folder}", *options.overrides])
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    models = [options.checkpoint, *options.beside]
    loaded = {name: load_teacher(name).to(device) for name in dict.fromkeys(models)}
    results: list[Result] = []
    for size in options.size or [config.image_size]:
        train, test, meaning = _open(options, config, size)
        shape = tuple(torch.as_tensor(test[0]["pixel_values"]).shape[-2:])
        for number, name in enumerate(models):
            frozen = Frozen(loaded[name], (shape[0], shape[1]))
            probes = probes_for(test[0]["labels"], *meaning)
            found = list(_probed(probes, frozen, train, test, options, f"{_short(name)} {shape[0]}x{shape[1]}"))
            for one in found:
                one.model, one.size = name, list(shape)
                if number:
                    one.beside = _difference(
                        next(r for r in results if r.probe == one.probe and r.size == one.size), one
                    )
            results += found
    console(100).print(table(results, options.folder))
    if options.json:
        kept = [{k: v for k, v in dataclasses.asdict(one).items() if k != "drawn"} for one in results]
        Path(options.json).write_text(to_json({"results": kept}), encoding="utf-8")
    return 0


def _open(
    options: argparse.Namespace, config: DataConfig, size: Sequence[int] | None
) -> tuple[Any, Any, tuple[int, int]]:
    """Training and test images as they are scored, and number of classes and void label."""
    named = options.task or _task_of(config)
    if named not in TASKS:
        raise InputError(f"--task: {not_one_of(named, TASKS)}")
    task = TASKS[named]
    if task.needs_teacher_in_evaluation:
        raise InputError(f"--task: expected one with labels, got {named!r}")
    catalog = task.open_data(config)
    if config.test_split is None and find_split("test", catalog.names()):
        config = replace(config, test_split="test")
    config = settled(config, catalog)  # what is held out for scoring is not fitted on
    if size is not None:
        config = replace(config, image_size=list(size))
    as_scored = replace(
        config, eval_split=config.train_split, max_eval_samples=options.limit or config.max_train_samples
    )
    _, known = task.from_data(as_scored, splits=("eval",))
    made, asked = task.from_data(config, splits=("test" if config.test_split is not None else "eval",))
    test = asked.test if asked.test is not None else asked.eval
    if test is None:
        raise InputError("data: expected a split to score on, found none; name it with data.test_split")
    sizes = {tuple(torch.as_tensor(images[0]["pixel_values"]).shape) for images in (known.eval, test)}
    if config.image_size is None and len(sizes) > 1:
        raise InputError(
            f"--size: expected one, as the images have several, got {sorted(sizes)}; give height and width"
        )
    return known.eval, test, (len(getattr(made, "id2label", None) or {}), getattr(made, "ignore_index", -100))


def _task_of(config: DataConfig) -> str:
    """The task whose labels a set holds, as far as its folder tells."""
    root = Path(str(config.path))
    if not root.is_dir() or described(root):
        return _task_with(READ[0])
    kinds = look(root).kinds
    found = next((_task_with(kind) for kind in READ if kind in kinds), None)
    if found is None:
        raise InputError(f"{root}: expected {', '.join(READ)}, got {', '.join(kinds)}; name a set with such labels")
    return found


def _task_with(kind: str) -> str:
    """The task whose labels are of this kind."""
    return next(name for name, task in TASKS.items() if task.label_kind == kind)


def _probed(
    probes: Sequence[Probe], frozen: Frozen, train: Any, test: Any, options: argparse.Namespace, title: str
) -> Iterator[Result]:
    """Fits and scores each probe of one model."""
    draw = torch.Generator().manual_seed(options.seed)
    most = max(16, MOST // frozen.channels // len(train))
    kept: list[list[torch.Tensor]] = [[], [], []]
    for index, (feature_map, label) in enumerate(_maps(frozen, train, options.batch_size, f"{title} reading")):
        features, labels = probes[0].features(feature_map, label, most, draw)
        for into, value in zip(kept, (features, labels, torch.full((len(labels),), index)), strict=True):
            into.append(value)
    features, labels, images = (torch.cat(values) for values in kept)
    del kept
    if not len(labels):
        raise InputError("data: expected labels to fit on, got none in the training images")
    if not features.isfinite().all():
        raise InputError(f"{title}: expected finite features, got NaN or infinity; its weights are damaged")
    for probe in probes:
        probe.fit(features, labels, images)
    del features
    scored: list[list[np.ndarray]] = [[] for _ in probes]
    for feature_map, label in _maps(frozen, test, options.batch_size, f"{title} scoring"):
        for probe, rows in zip(probes, scored, strict=True):
            rows.append(probe.statistics(feature_map, label))
    for probe, rows in zip(probes, scored, strict=True):
        statistics = np.stack(rows)
        drawn = resampled(statistics, probe.score, options.seed)
        made = Result("", probe.title, [], frozen.stride, frozen.channels, len(train), len(test))
        made.score, made.drawn = probe.score(statistics.sum(0)), drawn
        if np.isnan(made.score):
            raise InputError(f"data: expected labels to score on, got none in the {len(test)} test images")
        made.low, made.high = interval(drawn)
        made.lower_is_better = probe.lower_is_better
        yield made


def _maps(frozen: Frozen, images: Any, size: int, title: str) -> Iterator[tuple[torch.Tensor, Any]]:
    """The map and label of each image."""
    device = next(frozen.teacher.parameters()).device
    samples = (images[index] for index in range(len(images)))
    with tqdm(total=len(images), desc=title, unit="image", ncols=80) as bar:
        for pixels, labels in batches(samples, size):
            yield from zip(frozen(pixels.to(device)), labels, strict=True)
            bar.update(len(labels))


def _short(name: str) -> str:
    """The last part of a name, of at most 24 characters, for a progress bar."""
    return Path(name).name[-24:]


def _difference(first: Result, other: Result) -> dict[str, Any]:
    assert first.drawn is not None and other.drawn is not None
    low, high = interval(first.drawn - other.drawn)
    return {"of": first.model, "score": first.score - other.score, "low": low, "high": high}


def table(results: Sequence[Result], folder: str) -> Table:
    """The scores with their intervals, one row each, and how the first model differs."""
    made = Table(title=f"frozen features on {folder}, 95% intervals over the test images", title_justify="left")
    made.add_column("model", overflow="fold")
    for name in ("probe", "size", "channels", "score", "first minus this"):
        made.add_column(name, justify="right" if name in ("channels", "score") else "left")
    for one in results:
        less = ", less is better" if one.lower_is_better else ""
        beside = "" if one.beside is None else "{score:+.3f} ({low:+.3f} to {high:+.3f})".format(**one.beside)
        score = f"{one.score:.3f} ({one.low:.3f} to {one.high:.3f})"
        made.add_row(
            _short(one.model), one.probe + less, f"{one.size[0]}x{one.size[1]}", f"{one.channels:,}", score, beside
        )
    return made
