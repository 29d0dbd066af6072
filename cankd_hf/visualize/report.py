"""The report: one HTML file that holds all it shows, asks the network for nothing and needs no script."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jinja2

from cankd_hf.config.recipe import recipe_to_yaml
from cankd_hf.hub.sections import made, purpose, results_table, terms_table
from cankd_hf.visualize.checkpoint import OpenedCheckpoint

TEMPLATE = Path(__file__).with_name("report.html")


@dataclass
class Drawn:
    """One figure.

    Attributes:
        kind: which, a key of `FIGURES`.
        image: name of the image it is of; empty for the curves.
        png: the file's content.
    """

    kind: str
    image: str
    png: bytes

    @property
    def source(self) -> str:
        """The picture for an `img` element."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")

    @property
    def width(self) -> int:
        """Of the picture, in pixels: what a page may show at most without blurring it."""
        return int.from_bytes(self.png[16:20], "big")


class Text(NamedTuple):
    """What is said of a kind of figure: heading, what it shows, what is good, what is not."""

    title: str
    shows: str
    good: str
    warning: str


FIGURES = {
    "heat": Text(
        "Where each level is active",
        "Mean absolute activation over the channels of each map, over the image in grey; each map has its own scale "
        "(2nd to 98th percentile), so colours tell where a map is active and not how strongly.",
        "After distillation the student's maps light up at the places where the teacher's do, more than before it or "
        "alone.",
        "Maps that look like noise after training, or active along the image's border only.",
    ),
    "difference": Text(
        "Where student and teacher differ",
        "Half the squared difference of the instance-normalised maps, mean over channels, student after its "
        "connector. The mean below a panel is the distance that the loss of this pair minimises: 0 is equal, 1 is as "
        "unlike as unrelated maps. The last column is the student map after the Can block, which is what its loss "
        "sees.",
        "Darker after than before at every level. What stays bright is what a student of this size does not follow: "
        "often small things and edges.",
        "The last column much darker than the one before it: then the block makes up for the student, which itself "
        "has not come nearer (the shortcut).",
    ),
    "pca": Text(
        "Principal components as colours",
        "The first three principal components of the teacher's map in red, green and blue (instance-normalised, 2nd "
        "to 98th percentile); the student, after its connector, in the same basis and on the same scale, so equal "
        "colours mean equal features.",
        "The student's colours come to agree with the teacher's; things of one kind have one colour.",
        "Grey after training: the student has nothing along the teacher's main directions.",
    ),
    "own": Text(
        "Principal components as colours",
        "The first three principal components of each level in red, green and blue (instance-normalised, 2nd to 98th "
        "percentile), each level in its own basis.",
        "Things of one kind have one colour, with edges where the image has edges.",
        "Stripes or a frame along the border that follow the grid and not the image.",
    ),
    "attention": Text(
        "What one student pixel reads of the teacher",
        "The affinity of the marked pixel's cell to every position of the teacher's map (of the pooled map where the "
        "term sub-samples), for each CanKD term and pair of levels. Each panel has its own scale: the two Gaussian "
        "affinities are softmax weights that sum to 1; dot product and concatenation are not normalised, the first "
        "may be negative (colours are centred at 0), the second is cut off at 0 by its ReLU.",
        "Positions of the same kind as the pixel stand out. For the dot product sign and scale carry no meaning by "
        "themselves, only the contrast within a panel does.",
        "A softmax on a single key for whatever pixel, or a concatenation that is 0 everywhere: that term transfers "
        "nothing.",
    ),
    "curves": Text(
        "Training curves",
        "Feature losses are unweighted. Raw correlation and CKA compare the maps without the Can block (CKA without "
        "the connector too). A name like s1t0 is student level 1 with teacher level 0.",
        "Losses fall while raw correlation and CKA rise; the branch's share stays small.",
        "A loss that falls while raw similarity stands still, a share of the branch that grows towards 1, or a score "
        "that falls while the loss does.",
    ),
}


def write_report(
    file: Path, name: str, opened: OpenedCheckpoint, drawn: Sequence[Drawn], curves: Drawn | None, signs: Sequence[str]
) -> Path:
    """Writes the report.

    Args:
        file: where to.
        name: of the checkpoint, as it was asked for.
        opened: the checkpoint.
        drawn: figures of images.
        curves: training curves, where there are any.
        signs: warning signs found in the numbers.

    Returns:
        `file`.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    facts = opened.facts
    table, note = results_table(facts)
    compared = opened.teacher is not None
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=name,
        purpose=_plain(purpose(facts)),
        signs=signs,
        logged=any(opened.histories.values()),
        notes=opened.notes,
        results=table,
        results_note=note,
        images=[(image, [d for d in drawn if d.image == image]) for image in dict.fromkeys(d.image for d in drawn)],
        figures={**FIGURES, "pca": FIGURES["pca" if compared else "own"]},
        curves=curves,
        made=[(heading, _plain(said)) for heading, said in made(facts, licences=False)],
        terms=terms_table(facts),
        recipe=recipe_to_yaml(opened.recipe) if opened.recipe is not None else "",
    )
    file.write_text(text, encoding="utf-8")
    return file


def _plain(text: str) -> str:
    """Text of the card without its Markdown links and code marks."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).replace("`", "")
