"""From a checkpoint and images to figures, PNG files and the report.

The report is one HTML file that holds all it shows, needs no network and no script.
"""

import base64
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure

from cankd_hf import figures
from cankd_hf.config.recipe import recipe_to_yaml
from cankd_hf.errors import InputError
from cankd_hf.hub import escape, sections
from cankd_hf.training.checkpoint_files import check_folder
from cankd_hf.visualize.checkpoint import OpenedCheckpoint, open_checkpoint
from cankd_hf.visualize.images import Picture, padded, pictures_of_files, pictures_of_recipe

TEMPLATE = Path(__file__).with_name("report.html")
Pixel = tuple[int, int]


@dataclass
class Drawn:
    """One figure."""

    kind: str  # a key of `figures` in the template
    image: str  # its name; empty for the curves
    png: bytes  # the file's content

    @property
    def source(self) -> str:
        """The picture for an `img` element."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")

    @property
    def width(self) -> int:
        """Width of the picture in pixels."""
        return int.from_bytes(self.png[16:20], "big")


def visualize(
    checkpoint: str,
    overrides: Sequence[str] = (),
    images: Sequence[str] | None = None,
    count: int = 3,
    pixel: Pixel | None = None,
    output: Path | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Draws all figures of a checkpoint and writes the report.

    Args:
        checkpoint: folder of a run or of a checkpoint, or a Hub id.
        overrides: `section.key=value` changes to the saved recipe.
        images: files; None takes some of the recipe's own data.
        count: how many of those.
        pixel: row and column in each image whose attention is shown; None: the centre.
        output: where to write; None: `visualize/` inside of the checkpoint.
        say: called with a line of text for each step and for what is left out.

    Returns:
        The report's path.

    Raises:
        InputError: for a checkpoint without a student, or without any image that can be used.
    """
    say(f"opening {checkpoint}")
    opened = open_checkpoint(checkpoint, overrides)
    for note in opened.notes:
        say(f"note: {note}")
    if images is not None:
        pictures = pictures_of_files(images, opened.task, opened.data, say)
    elif opened.recipe is not None:
        pictures = pictures_of_recipe(opened.recipe, count)
    else:
        raise InputError("--images: expected image files, got none; there is no recipe that says where data are")
    _check_pixel(pixel, pictures)
    if output is None:
        local = Path(checkpoint).is_dir()
        output = Path(checkpoint) / "visualize" if local else Path("visualize") / Path(checkpoint).name
    check_folder(output, "--output")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for subject in opened.subjects:
        subject.taps.model.to(device)
    for teacher in opened.teachers.values():
        teacher.to(device)
    drawn = []
    for number, picture in enumerate(pictures, start=1):
        say(f"image {number} of {len(pictures)}: {picture.name}")
        drawn += _draw(opened, picture, number, pixel, output)
    task, history = opened.task, next(iter(opened.histories.values()))
    figure = figures.training_curves(opened.histories, task.metric)
    curves = None if figure is None else _save("curves", "", figure, output / "curves.png")
    scores = {arm["name"]: arm.get("scores") or {} for arm in opened.facts.results.get("arms") or []}
    signs = figures.warning_signs(history, task.metric, scores, task.greater_is_better, _keeps_best(opened))
    for said in [*_working(opened), *(f"warning sign: {sign}" for sign in signs)]:
        say(said)
    report = output / "report.html"
    report.write_text(_html(checkpoint, opened, drawn, curves, signs), encoding="utf-8")
    return report


def _keeps_best(opened: OpenedCheckpoint) -> bool:
    return opened.recipe is not None and bool(opened.recipe.training.get("load_best_model_at_end"))


def _working(opened: OpenedCheckpoint) -> list[str]:
    """The verdict that the run itself has come to, as one line; none of runs without a teacher."""
    line = (opened.facts.run.get("working") or {}).get("line")
    return [f"Is it working? {line}"] if line else []


def _check_pixel(pixel: Pixel | None, pictures: Sequence[Picture]) -> None:
    for picture in pictures:
        height, width = picture.size
        if pixel and (pixel[0] >= height or pixel[1] >= width):
            raise InputError(
                f"--pixel: expected a row below {height} and a column below {width} for {picture.name}, "
                f"got {pixel[0]},{pixel[1]}"
            )


def _draw(opened: OpenedCheckpoint, picture: Picture, number: int, pixel: Pixel | None, output: Path) -> list[Drawn]:
    picture = padded(picture, opened.task, opened.data)
    seen = figures.look(
        picture.name, picture.pixel_values, picture.image, opened.subjects, opened.teachers, picture.size
    )
    made = {
        "heat": figures.heat_maps(seen),
        "difference": figures.difference_maps(seen),
        "pca": figures.pca_maps(seen),
        "attention": figures.attention_maps(seen, pixel),
    }
    stem = re.sub(r"[^\w.-]+", "_", Path(picture.name).stem)
    return [
        _save(kind, picture.name, figure, output / f"{number}_{stem}_{kind}.png")
        for kind, figure in made.items()
        if figure is not None
    ]


def _save(kind: str, image: str, figure: Figure, file: Path) -> Drawn:
    content = figures.to_png(figure)
    file.write_bytes(content)
    return Drawn(kind, image, content)


def _html(
    name: str, opened: OpenedCheckpoint, drawn: Sequence[Drawn], curves: Drawn | None, signs: Sequence[str]
) -> str:
    facts = opened.facts
    table, note = sections.results_table(facts)
    return figures.render_page(
        TEMPLATE,
        name=name,
        purpose=escape.plain(sections.purpose(facts)),
        working=_working(opened),
        signs=signs,
        logged=any(opened.histories.values()),
        notes=opened.notes,
        results=table,
        results_note=escape.plain(note),
        images=[(image, [d for d in drawn if d.image == image]) for image in dict.fromkeys(d.image for d in drawn)],
        compared=bool(opened.teachers),
        curves=curves,
        made=[(escape.plain(heading), escape.plain(said)) for heading, said in sections.made(facts, licences=False)],
        terms=sections.terms_table(facts),
        recipe=recipe_to_yaml(opened.recipe) if opened.recipe is not None else "",
    )
