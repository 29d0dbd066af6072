"""Segmentation sets: opened, checked and wrapped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.sources import ROLES, AnyDataset, by_role, open_set, wrap
from cankd_hf.data.segmentation.collate import SegmentationCollator
from cankd_hf.data.segmentation.transforms import EvalTransform, TrainTransform
from cankd_hf.errors import InputError


@dataclass
class SegmentationData:
    """The data sets of a segmentation run.

    Attributes:
        train: items with `pixel_values` [3, h, w] and `labels` [h, w], augmented.
        eval: items at `image_size`, the labels at the size of each mask; None without such a split.
        test: the same for the final table.
        id2label: names of the classes 0..K-1.
        ignore_index: label that counts in no loss and no score.
        palette: a colour for each class.
        facts: plain data for reports and cards: source, splits, skipped, warnings, class names.
    """

    train: AnyDataset | None
    eval: AnyDataset | None
    test: AnyDataset | None
    id2label: dict[int, str]
    ignore_index: int
    palette: dict[int, tuple[int, int, int]]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def collate(self) -> SegmentationCollator:
        """The collator that pads with this set's void label."""
        return SegmentationCollator(self.ignore_index)


def load_segmentation(
    config: DataConfig, need_labels: bool = True, splits: Sequence[str] = ROLES, seed: int = 0
) -> SegmentationData:
    """Open, check and wrap a segmentation set.

    Args:
        config: the `data:` section.
        need_labels: False: masks are not read, items hold `pixel_values` alone.
        splits: which of train, eval, test to load.
        seed: of the shuffle of a stream.

    Raises:
        InputError: for a set that does not exist, lacks a split or class names, or holds unusable images or masks
            (only the wholly broken ones with `on_error: skip`).
    """
    config.check_values()
    catalog = open_set(config, need_masks=need_labels)
    if need_labels and not catalog.labels.id2label:
        raise InputError(
            f"data.labels: expected the class names of {config.path}, found none; name a json file like "
            '{"id2label": {"0": "sky", ...}} under data.labels, or give data.num_labels'
        )
    sources = by_role(config, catalog, splits)
    ignore_index = catalog.labels.ignore_index
    loaded, facts = wrap(
        config,
        catalog,
        sources,
        need_labels,
        seed,
        lambda role: TrainTransform(config, ignore_index) if role == "train" else EvalTransform(config),
    )
    return SegmentationData(
        loaded["train"],
        loaded["eval"],
        loaded["test"],
        catalog.labels.id2label,
        ignore_index,
        catalog.labels.colours(),
        facts,
    )
