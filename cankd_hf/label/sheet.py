"""The contact sheet: pictures with their labels, the least certain ones and some spread over the set."""

from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image

from cankd_hf.data.common.decode import Decoder
from cankd_hf.figures import render_page
from cankd_hf.label.folder import METADATA
from cankd_hf.label.predict import Job
from cankd_hf.label.records import Record, read_lines
from cankd_hf.tasks.labelling import Summary
from cankd_hf.tasks.pictures import class_colours, draw_grid

SHEET, PAGE = "contact.png", "contact.html"
TEMPLATE = Path(__file__).with_name("contact.html")
COLUMNS = 2
WIDTH = 320  # pixels of one picture
LISTED = 500  # pictures on the page, the least certain first


def write_sheet(job: Job, kept: list[Record], summary: Summary, report: dict[str, Any]) -> None:
    """Writes `contact.png`, and `contact.html` with it and the numbers."""
    out, split = job.records.out, job.output.split
    lines = {line["file_name"]: line for line in read_lines(out / split / METADATA)}
    there = [record for record in kept if record["file_name"] in lines]
    order = sorted(there, key=lambda record: record["confidence"])
    if order:
        _draw(job, _chosen(order, there, job.options.sheet), lines, out / SHEET)
    page = render_page(
        TEMPLATE,
        place=lambda name: quote(f"{split}/{name}"),
        report=report,
        most=max(1, *report["confidence"]),
        sheet=SHEET if order else None,
        worst=[lines[record["file_name"]] | {"confidence": record["confidence"]} for record in order[:LISTED]],
        beside=list(job.labelling.beside),
    )
    (out / PAGE).write_text(page, encoding="utf-8")


def _chosen(order: list[Record], kept: list[Record], count: int) -> list[Record]:
    """Half of them the least certain, half spread over the set."""
    worst = order[: -(-min(count, len(order)) // 2)]
    known = {record["source"] for record in worst}
    rest = [record for record in kept if record["source"] not in known]
    places = np.linspace(0, len(rest) - 1, min(count - len(worst), len(rest))).astype(int)
    return [*worst, *(rest[place] for place in places)]


def _draw(job: Job, chosen: list[Record], lines: dict[str, Any], file: Path) -> None:
    shown, captions = [], []
    for record in chosen:
        line = lines[record["file_name"]]
        shown.append(_pair(job, line))
        captions.append(f"{Path(line['file_name']).name}  {record['confidence']:.2f}")
    while len(shown) % COLUMNS:
        shown.append(np.full_like(shown[0], 255))
        captions.append("")
    height = max(picture.shape[0] for picture in shown)
    padded = [np.pad(one, ((0, height - len(one)), (0, 0), (0, 0)), constant_values=255) for one in shown]
    rows = [padded[first : first + COLUMNS] for first in range(0, len(padded), COLUMNS)]
    names = job.labelling.id2label
    colours = class_colours(len(names), job.labelling.palette) / 255
    legend = [(names[label], colours[label]) for label in sorted(names)[:24]]
    below = [captions[first : first + COLUMNS] for first in range(0, len(captions), COLUMNS)]
    draw_grid(file, [""] * COLUMNS, rows, legend, captions=below, width=2 * WIDTH)


def _pair(job: Job, line: dict[str, Any]) -> np.ndarray:
    """An image [h, 2 * WIDTH, 3] beside itself with its label."""
    folder = job.records.out / job.output.split
    decoder = Decoder(job.images.config.max_pixels)
    image = decoder.image(folder / line["file_name"], line["file_name"])
    name = line.get("mask_file_name")
    mask = None if not name else torch.from_numpy(np.array(decoder.picture(folder / name, name))).long()
    drawn = job.labelling.draw(image, line, mask)
    size = WIDTH, max(1, round(WIDTH * image.shape[-2] / image.shape[-1]))
    pictures = [Image.fromarray(one).resize(size) for one in (image.permute(1, 2, 0).contiguous().numpy(), drawn)]
    return np.concatenate([np.asarray(one) for one in pictures], axis=1)
