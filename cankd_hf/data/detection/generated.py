"""The generated set with its shapes as objects: class, box and mask of what is seen of each."""

from dataclasses import dataclass

import numpy as np
import torch

from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.dataset import Source
from cankd_hf.data.common.decode import Sample
from cankd_hf.data.common.labels import Labels
from cankd_hf.data.common.opening import OF_FILES, without_meaning
from cankd_hf.data.detection.objects import Objects
from cankd_hf.data.generated import SHAPE_CLASSES, SHAPE_PALETTE, ShapesSource, generated_splits
from cankd_hf.run_lengths import encoded

LEAST = 12  # pixels that are seen of an object


@dataclass(eq=False)
class ObjectsSource(ShapesSource):
    """The pictures of `ShapesSource`, with the shapes as objects; what is hidden of one belongs to no mask.

    With `outlined` false they have boxes alone.
    """

    outlined: bool = True

    def load(self, index: int) -> Sample:
        """Draw image [3, H, W] and its objects."""
        image, shapes = self.drawn(index)
        covered, seen = np.zeros((self.pixels, self.pixels), bool), []
        for label, inside in reversed(shapes):  # the uppermost first
            seen.append((label - 1, inside & ~covered))
            covered |= inside
        kept = [one for one in reversed(seen) if one[1].sum() >= LEAST]
        masks = np.stack([mask for _, mask in kept])
        objects = Objects(
            torch.stack([_box(mask) for mask in masks]),
            torch.tensor([label for label, _ in kept]),
            torch.from_numpy(masks.sum((1, 2))).float(),
            torch.zeros(len(kept), dtype=torch.int64),
            index,
            outlines=tuple(encoded(masks)) if self.outlined else None,
            size=(self.pixels, self.pixels),
        )
        return Sample(image, objects if self.masks else None, self.name(index))


class GeneratedObjects:
    """The splits of the generated set; `masked`: each object has a mask, too."""

    def __init__(self, config: DataConfig, masked: bool) -> None:
        made = generated_splits(config.generated)
        self.splits = {name: ObjectsSource(**vars(source), outlined=masked) for name, source in made.items()}
        classes = {key - 1: name for key, name in SHAPE_CLASSES.items() if key}
        self.labels = Labels(classes, palette={label: SHAPE_PALETTE[label + 1] for label in classes})
        of_files = set(OF_FILES) - {"mask_column", "ignore_index", "reduce_labels"}  # told of every set with objects
        others = ("streaming", "shuffle_buffer", "objects_column", "box_format", "annotations")
        self.warnings = without_meaning(config, *of_files, *others, where="generated images")

    def names(self) -> list[str]:
        return list(self.splits)

    def source(self, name: str) -> Source:
        return self.splits[name]


def _box(mask: np.ndarray) -> torch.Tensor:
    """x0, y0, x1, y1 of what a mask [H, W] covers."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=torch.float32)
