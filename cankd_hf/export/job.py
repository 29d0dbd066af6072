"""What one export works with: the student, the options, the images, and the files written so far."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from cankd_hf.errors import InputError
from cankd_hf.export.checks import IMAGES, scores_wanted
from cankd_hf.export.files import Traced
from cankd_hf.export.images import Images, calibration_images, data_config, scored_images
from cankd_hf.export.source import Source
from cankd_hf.tasks.export_forms import Compared, ExportForm

Size = tuple[int, int]


@dataclass
class Inputs:
    """The images that an export reads."""

    scored: Images | None = None
    not_scored: str | None = None  # why there are none to score on
    calibration: Images | None = None
    count: int = IMAGES  # of images to calibrate on
    used: int = 0
    resized: Size | None = None  # what all images were resized to, other than evaluation does

    def resize(self, size: Size) -> None:
        """Makes all images of one size, for files that take no other."""
        for images in (self.scored, self.calibration):
            if images is not None and images.resize(size):
                self.resized = size


@dataclass
class Job:
    """One export."""

    source: Source
    form: ExportForm
    size: Size
    options: argparse.Namespace
    threads: int
    inputs: Inputs


@dataclass
class Written:
    """A file that was written aside and checked."""

    dtype: str
    file: Path
    traced: Traced
    checks: list[Compared]
    facts: dict[str, str]  # its metadata

    @property
    def parts(self) -> list[Path]:
        """The model and, where they are too large for it, its weights."""
        return sorted(self.file.parent.iterdir())

    @property
    def bytes(self) -> int:
        """Of all parts."""
        return sum(part.stat().st_size for part in self.parts)


def open_inputs(source: Source, options: argparse.Namespace) -> Inputs:
    """Opens the images to score and to calibrate on.

    A split to score on that nobody asked for may be missing; `not_scored` has the reason.

    Raises:
        InputError: for data that are asked for, or needed, and cannot be used.
    """
    inputs = Inputs(count=options.calibration_images or IMAGES)
    folder, quantised = options.calibrate, "int8" in options.dtype
    if scores_wanted(options):
        try:
            inputs.scored = scored_images(source, data_config(source, options.overrides), options.split)
        except InputError as error:
            if options.split is not None or options.overrides or (quantised and folder is None):
                raise
            inputs.not_scored = f"{error.problems[0]} (data.path=... names the data)"
    if quantised:
        # With a folder, only how images are read counts of the recipe, whose data may be gone.
        overrides = options.overrides if folder is None else [*options.overrides, "data.path=."]
        inputs.calibration = calibration_images(source, data_config(source, overrides), folder)
    return inputs
