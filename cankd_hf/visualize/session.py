"""From a checkpoint and images to figures, PNG files and the report."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from cankd_hf.errors import InputError
from cankd_hf.figures import (
    attention_maps,
    difference_maps,
    heat_maps,
    look,
    pca_maps,
    to_png,
    training_curves,
    warning_signs,
)
from cankd_hf.visualize.checkpoint import OpenedCheckpoint, open_checkpoint
from cankd_hf.visualize.images import Picture, padded, pictures_of_files, pictures_of_recipe
from cankd_hf.visualize.report import Drawn, write_report

Pixel = tuple[int, int]


def visualize(
    checkpoint: str,
    overrides: Sequence[str] = (),
    images: Sequence[str] | None = None,
    count: int = 3,
    pixel: Pixel | None = None,
    output: Path | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Draws everything that can be drawn of a checkpoint and writes the report.

    Args:
        checkpoint: folder of a run or of a checkpoint, or a Hub id.
        overrides: `section.key=value` changes to the saved recipe.
        images: files; None takes some of the recipe's own data.
        count: how many of those.
        pixel: row and column in each image whose attention is shown; None: the centre.
        output: where to write; None: `visualize/` inside of the checkpoint.
        say: told of each step, and of what is left out.

    Returns:
        The report's path.

    Raises:
        InputError: for a checkpoint without a student, or without any image that can be used.
    """
    say(f"opening {checkpoint}")
    opened = open_checkpoint(checkpoint, overrides)
    for note in opened.notes:
        say(f"note: {note}")
    pictures = _pictures(opened, images, count, say)
    _check_pixel(pixel, pictures)
    if output is None:
        local = Path(checkpoint).is_dir()
        output = Path(checkpoint) / "visualize" if local else Path("visualize") / Path(checkpoint).name
    output.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for subject in opened.subjects:
        subject.taps.model.to(device)
    if opened.teacher is not None:
        opened.teacher.to(device)
    drawn = []
    for number, picture in enumerate(pictures, start=1):
        say(f"image {number} of {len(pictures)}: {picture.name}")
        drawn += _draw(opened, picture, number, pixel, output)
    curves = _curves(opened, output)
    task, history = opened.task, next(iter(opened.histories.values()))
    signs = warning_signs(history, task.metric, _scores(opened), task.greater_is_better)
    for sign in signs:
        say(f"warning sign: {sign}")
    return write_report(output / "report.html", checkpoint, opened, drawn, curves, signs)


def _pictures(
    opened: OpenedCheckpoint, images: Sequence[str] | None, count: int, say: Callable[[str], None]
) -> list[Picture]:
    if images is not None:
        return pictures_of_files(images, opened.task, opened.data, say)
    if opened.recipe is None:
        raise InputError("--images: expected image files, got none; there is no recipe that says where data are")
    return pictures_of_recipe(opened.recipe, count)


def _check_pixel(pixel: Pixel | None, pictures: Sequence[Picture]) -> None:
    outside = [p for p in pictures if pixel and (pixel[0] >= p.size[0] or pixel[1] >= p.size[1])]
    if outside and pixel:
        height, width = outside[0].size
        raise InputError(
            f"--pixel: expected a row below {height} and a column below {width} for {outside[0].name}, "
            f"got {pixel[0]},{pixel[1]}"
        )


def _draw(opened: OpenedCheckpoint, picture: Picture, number: int, pixel: Pixel | None, output: Path) -> list[Drawn]:
    picture = padded(picture, opened.task, opened.data)
    seen = look(picture.name, picture.pixel_values, picture.image, opened.subjects, opened.teacher, picture.size)
    figures = {
        "heat": heat_maps(seen),
        "difference": difference_maps(seen),
        "pca": pca_maps(seen),
        "attention": attention_maps(seen, pixel),
    }
    stem = re.sub(r"[^\w.-]+", "_", Path(picture.name).stem)
    return [
        _save(kind, picture.name, figure, output / f"{number}_{stem}_{kind}.png")
        for kind, figure in figures.items()
        if figure is not None
    ]


def _curves(opened: OpenedCheckpoint, output: Path) -> Drawn | None:
    figure = training_curves(opened.histories, opened.task.metric)
    return None if figure is None else _save("curves", "", figure, output / "curves.png")


def _save(kind: str, image: str, figure: Figure, file: Path) -> Drawn:
    content = to_png(figure)
    file.write_bytes(content)
    return Drawn(kind, image, content)


def _scores(opened: OpenedCheckpoint) -> dict[str, dict[str, float]]:
    return {arm["name"]: arm.get("scores") or {} for arm in opened.facts.results.get("arms") or []}
