"""Looks at a data set: what it is, what its images and labels are, and what is wrong with it."""

from __future__ import annotations

import io
import logging
import os
import random
import shlex
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cankd_hf.config.advice import not_one_of
from cankd_hf.config.data import DataConfig
from cankd_hf.config.recipe import Recipe
from cankd_hf.data.common.dataset import Source, StreamSource
from cankd_hf.data.common.decode import Sample, Unlabelled, Unusable, WrongLabels
from cankd_hf.data.common.files import shortened
from cankd_hf.data.common.folders import FolderSource, described, usual_split
from cankd_hf.data.common.hashes import picture_hash
from cankd_hf.data.common.holdout import lacking, with_held_out
from cankd_hf.data.common.leaks import shared_files
from cankd_hf.data.common.progress import Told
from cankd_hf.data.common.tables import TableSource, is_table_path
from cankd_hf.data.layouts import look
from cankd_hf.data.layouts.base import Found
from cankd_hf.errors import InputError
from cankd_hf.tasks import TASKS, Task, TaskData
from cankd_hf.tasks.overview import Overview

logger = logging.getLogger(__name__)
ORDER = ("train", "validation", "test")
PICTURES = 12
SECONDS = 20.0  # for reading images, shared out among the splits
THREADS = 4  # that decode: Pillow and torchvision release the GIL
WORDS = {"instances": "masks of objects", "depths": "depth maps"}  # kinds of labels, where they are called otherwise
ALIKE = 0.02  # shapes of images that differ by less are one


@dataclass
class Seen:
    """What is known of a data set.

    Attributes:
        path: as given.
        layout: its name as a person says it.
        kind: of labels that were looked at: masks, boxes, images, ...
        kinds: what it has.
        task: that learns from these labels.
        sizes: images of each split.
        read: images of each split that were decoded.
        overview: counts of the labels.
        shapes: (width, height) of each decoded image, upright.
        modes: "JPEG, RGB" -> decoded images.
        rotated: decoded images that EXIF turns.
        animated: decoded images of several frames or pages.
        pictures: (split, sample) to draw.
        notes: what was assumed.
        problems: what is wrong.
        settings: the section `data:` to paste.
        whole: the set with labels that these images are a part of, which is to be looked at instead; None: they are
            all.
    """

    path: str
    layout: str
    kind: str
    kinds: tuple[str, ...]
    task: type[Task]
    overview: Overview
    sizes: dict[str, int] = field(default_factory=dict)
    read: dict[str, int] = field(default_factory=dict)
    shapes: list[tuple[int, int]] = field(default_factory=list)
    modes: Counter[str] = field(default_factory=Counter)
    rotated: int = 0
    animated: int = 0
    pictures: list[tuple[str, Sample]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    whole: str | None = None

    @property
    def sampled(self) -> bool:
        """Whether there are images that were not decoded."""
        return any(self.read.get(name, 0) < size for name, size in self.sizes.items())

    @property
    def asked_for(self) -> bool:
        """Whether other labels are looked at, and learned from, where none are named."""
        return bool(self.kinds) and self.kind != self.kinds[0]


def look_at(path: str, kind: str | None, limit: int) -> Seen:
    """Looks at a data set.

    Args:
        path: what `data.path` may be.
        kind: of labels: masks, boxes, ...; None: the first that it has.
        limit: images of each split to decode, spread evenly.

    Raises:
        InputError: where there is no data set, or it has no labels of this kind.
    """
    found, task, kinds = _task_of(path, kind)
    config = DataConfig(path=path, on_error="skip")
    catalog = task.open_data(config)
    layout = found.layout if found is not None else _named(path)
    seen = Seen(path, layout, task.label_kind, kinds, task, task.overview(catalog.labels))
    seen.whole = None if found is None or found.whole is None else str(found.whole)
    sources: dict[str, Source] = {}
    for own in catalog.names():
        name = own if usual_split(own) in sources else usual_split(own)
        try:
            source = catalog.source(own)
        except InputError as error:
            seen.problems += shortened(error.problems)
            continue
        assert not isinstance(source, StreamSource)  # that is asked for by a setting
        sources[name] = source
    if not sources:
        raise InputError(seen.problems or f"{path}: expected at least one split, got none")
    sources = {name: sources[name] for name in sorted(sources, key=_place)}
    seen.sizes = {name: len(source) for name, source in sources.items()}
    for name, source in sources.items():
        seen.overview.begin(name, source)
        _read(seen, name, source, limit, SECONDS / len(sources), PICTURES if len(sources) == 1 else PICTURES // 2)
    seen.problems += [f"{name}: no images" for name, size in seen.sizes.items() if not size]
    seen.pictures = _balanced(seen.pictures)
    told = found.notes if found is not None and kind is None else []  # some are said only where no kind is asked for
    seen.notes += dict.fromkeys([*told, *catalog.warnings])
    seen.problems += [*seen.overview.problems(seen.sampled), *_twice(seen, sources)]
    seen.settings = _section(path, found, seen, sources.get("train"))
    return seen


def kind_of(named: str | None) -> str | None:
    """The kind of labels that a task learns from, which names it too. Raises InputError for what names none."""
    if named is None or any(named == task.label_kind for task in TASKS.values()):
        return named
    if named not in TASKS:
        raise InputError(f"--task: {not_one_of(named, TASKS)}")
    return TASKS[named].label_kind


def _place(split: str) -> int:
    """Where a split stands among others."""
    return ORDER.index(split) if split in ORDER else len(ORDER)


def _task_of(path: str, kind: str | None) -> tuple[Found | None, type[Task], tuple[str, ...]]:
    """What `look` found, the task that learns from the labels, and the kinds of labels that there are."""
    found = None
    if _is_plain_folder(path):
        found = look(Path(path), kind)
    by_kind = {task.label_kind: task for task in reversed(TASKS.values())}
    if found is not None:
        wanted = kind or next((one for one in found.kinds if one in by_kind), "images")
        return found, by_kind[wanted], found.kinds
    problems: Counter[str] = Counter()
    able: list[str] = []
    for name, task in reversed(by_kind.items()):
        try:
            catalog = task.open_data(DataConfig(path=path, on_error="skip"))
            catalog.source(catalog.names()[0])
        except InputError as error:
            problems.update(list(dict.fromkeys(error.problems)) if kind in (None, name) else [])
            continue
        if catalog.labels.id2label or not task.overview.unit:
            able.append(name)
    labelled = [name for name in able if name != "images"] or able
    if not able or (kind is not None and kind not in able):
        # What stands in the way of most tasks is wrong with the files; each other one misses labels of its own.
        most = max(problems.values(), default=0)
        told = [problem for problem, count in problems.items() if count == most]
        named = ", ".join(by_kind[name].name for name in able)
        raise InputError(told or f"--task: of {path} expected one of {named}, got {by_kind[kind or able[0]].name!r}")
    return None, by_kind[kind or labelled[0]], tuple(labelled)


def _named(path: str) -> str:
    """What a set is that is no folder of images."""
    if path == "shapes":
        return "generated images"
    if os.path.isdir(path) and not is_table_path(path):
        return "images with a metadata file"
    return "a table of images" if is_table_path(path) else "a data set of the Hub"


def _read(seen: Seen, split: str, source: Source, limit: int, seconds: float, pictures: int) -> None:
    """Decodes images spread over a split, until there were `limit` of them or the time is over."""
    chosen = np.linspace(0, len(source) - 1, min(limit, len(source))).astype(int).tolist()
    random.Random(0).shuffle(chosen)  # so that those read until the time is over are spread, too
    begun, seen.read[split] = time.perf_counter(), 0
    problems: list[str] = []
    bare: list[str] = []
    with ThreadPoolExecutor(THREADS) as pool, Told(f"reading {split}", len(chosen)) as bar:
        for start in range(0, len(chosen), 4 * THREADS):
            if time.perf_counter() - begun > seconds:
                break
            part = chosen[start : start + 4 * THREADS]
            for sample in pool.map(lambda index: _sample(source, index), part):
                seen.read[split] += 1
                if isinstance(sample, Unlabelled):
                    bare.append(str(sample).partition(":")[0])
                elif isinstance(sample, InputError):
                    problems += sample.problems
                else:
                    loaded, mode, turned, frames = sample
                    _count(seen, split, loaded, mode, turned)
                    seen.animated += frames > 1
                    if len([one for one, _ in seen.pictures if one == split]) < pictures:
                        seen.pictures.append((split, loaded))
            bar.to(seen.read[split])
    if bare:
        images = "1 image" if len(bare) == 1 else f"{len(bare)} images"
        seen.problems.append(f"{split}: {images} without a label, first {bare[0]}")
    seen.problems += [f"{split}: {problem}" for problem in shortened(problems)]


def _sample(source: Source, index: int) -> tuple[Sample, str, bool, int] | InputError:
    """A decoded sample, its format and mode, whether EXIF turns it, and its pictures; or why there is none."""
    try:
        sample = source.load(index)
    except (Unusable, WrongLabels) as error:
        return error
    if not isinstance(source, FolderSource | TableSource):
        return sample, "generated, RGB", False, 1
    content = source.content(index)
    with Image.open(content if isinstance(content, Path) else io.BytesIO(content)) as picture:
        turned = picture.getexif().get(0x0112, 1) != 1
        return sample, f"{picture.format}, {picture.mode}", turned, getattr(picture, "n_frames", 1)


def _count(seen: Seen, split: str, sample: Sample, mode: str, turned: bool) -> None:
    seen.overview.add(split, sample)
    seen.shapes.append((sample.image.shape[-1], sample.image.shape[-2]))
    seen.modes[mode] += 1
    seen.rotated += turned


def _balanced(pictures: Sequence[tuple[str, Sample]]) -> list[tuple[str, Sample]]:
    """At most twelve pictures, of all splits: half of them of the first one."""
    names = list(dict.fromkeys(split for split, _ in pictures))
    by_name = {name: [item for item in pictures if item[0] == name] for name in names}
    others = [item for name in names[1:] for item in by_name[name]]
    share = PICTURES // 2 // max(1, len(names) - 1)
    chosen = [item for name in names[1:] for item in by_name[name][:share]]
    first = by_name[names[0]][: PICTURES - len(chosen)] if names else []
    spare = [item for item in others if not any(item is one for one in chosen)]
    return [*first, *chosen, *spare][:PICTURES]


def _twice(seen: Seen, sources: dict[str, Source]) -> list[str]:
    """Pictures that two splits share: files of equal content, or of sets without files equal pixels of those read."""
    found = []
    names = list(sources)
    for place, name in enumerate(names[1:], 1):
        earlier = {one: sources[one] for one in names[:place]}
        source = sources[name]
        files = {key: one for key, one in earlier.items() if isinstance(one, FolderSource)}
        if not isinstance(source, FolderSource) or not files:
            continue
        parts = {key: (one, range(len(one))) for key, one in files.items()}
        if shared := shared_files((source, range(len(source))), parts):
            found.append(f"{len(shared)} files of {name} are in another split too, first {shared[0]}")
    if not any(isinstance(source, FolderSource) for source in sources.values()):
        hashes: dict[str, str] = {}
        for split, sample in seen.pictures:
            other = hashes.setdefault(picture_hash(sample.image), split)
            if other != split:
                found.append(f"{sample.name} is in {other} and in {split}")
    return found


def _section(path: str, found: Found | None, seen: Seen, train: Source | None) -> dict[str, Any]:
    """The `data:` section to paste."""
    if found is not None:
        settings = {**found.section(), "path": path}
    else:
        names = list(seen.sizes)
        roles = {"train_split": "train", "eval_split": "validation", "test_split": "test"}
        settings = {"path": path, **{key: name if name in names else None for key, name in roles.items()}}
        settings["train_split"] = settings["train_split"] or names[0]
    missing, _ = lacking(DataConfig(path=path), list(seen.sizes))
    if missing and seen.sizes["train"] > len(missing):
        numbered = list(train.rows.names) if isinstance(train, FolderSource) else ()
        config, said = with_held_out(DataConfig(path=path), seen.sizes["train"], missing, path, numbered, clips=True)
        settings |= {"train_split": config.train_split, "eval_split": config.eval_split}
        seen.notes += said
    if seen.shapes:
        settings["image_size"] = list(image_size(seen.shapes))
    default = DataConfig()
    splits = ("train_split", "eval_split")
    kept = {key: value for key, value in settings.items() if key in splits or value != getattr(default, key)}
    return {"path": path, **kept}


def image_size(shapes: Sequence[tuple[int, int]], longest: int = 512) -> tuple[int, int]:
    """[height, width] for training: the median shape, in multiples of 32, with a long side of at most `longest`."""
    width, height = (statistics.median(sides) for sides in zip(*shapes, strict=True))
    factor = min(1.0, longest / max(width, height))
    return tuple(max(64, round(side * factor / 32) * 32) for side in (height, width))  # type: ignore[return-value]


def shape_lines(seen: Seen) -> list[str]:
    """Sizes, shapes and formats of the images that were read, in words."""
    if not seen.shapes:
        return []
    widths, heights = zip(*seen.shapes, strict=True)
    shapes = [width / height for width, height in seen.shapes]
    if len(set(seen.shapes)) == 1:
        lines = [f"all {widths[0]} x {heights[0]} pixels"]
    else:
        small, large = (pick(seen.shapes, key=lambda shape: shape[0] * shape[1]) for pick in (min, max))
        middle = f"{statistics.median(widths):.0f} x {statistics.median(heights):.0f}"
        lines = [f"{small[0]} x {small[1]} to {large[0]} x {large[1]} pixels, median {middle}"]
        if max(shapes) - min(shapes) > ALIKE:
            lines[0] += (
                f"; width by height {min(shapes):.2f} to {max(shapes):.2f}, median {statistics.median(shapes):.2f}"
            )
    kinds = ", ".join(
        f"{mode} ({count})" if len(seen.modes) > 1 else mode for mode, count in seen.modes.most_common(5)
    )
    lines.append(f"{kinds}; read as three channels" + (f"; {seen.rotated} turned by EXIF" if seen.rotated else ""))
    if seen.animated:
        lines.append(f"{seen.animated} of several frames or pages, of which the first is read")
    return lines


def short_lines(recipe: Recipe, task: Task, data: TaskData) -> list[str]:
    """What a recipe's data is, in two lines, for a dry run, which has loaded it."""
    path, kind = str(recipe.data.path), task.label_kind
    layout, wanted = _named(path), ""
    if _is_plain_folder(path):
        try:
            found = look(Path(path), None if kind == "images" else kind)
            layout, other = found.layout, kind != "images" and kind != found.kinds[0]
            wanted = f" --task {task.name}" if other else ""
        except InputError as error:  # its labels are not read: the recipe learns without
            logger.info("data: %s", error)
    splits = ", ".join(
        f"{role} {'a stream' if size is None else f'{size:,}'}" for role, size in data.facts["splits"].items()
    )
    names = data.facts["classes"] if kind != "images" else []
    classes = f"; {len(names)} classes: {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}" if names else ""
    said = f"data: {layout}, {WORDS.get(kind, kind)} in {path}: {splits}{classes}"
    return (
        [said] if path == "shapes" else [said, f"pictures and problems of it: cankd data {shlex.quote(path)}{wanted}"]
    )


def _is_plain_folder(path: str) -> bool:
    """Whether a path is a folder whose layout has to be found."""
    return os.path.isdir(path) and not is_table_path(path) and not described(Path(path))
