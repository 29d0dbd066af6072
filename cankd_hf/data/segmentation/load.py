"""Loads segmentation data sets."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.opening import open_set, without_meaning
from cankd_hf.data.common.sources import ROLES, TaskData, by_role, wrap
from cankd_hf.data.layouts.catalog import FoundSet
from cankd_hf.data.segmentation.collate import segmentation_collate
from cankd_hf.data.segmentation.transforms import EvalTransform, TrainTransform
from cankd_hf.errors import together


@dataclass(kw_only=True)
class SegmentationData(TaskData):
    """The data sets of a segmentation run; `labels` are [h, w], in evaluation of the size of each mask."""

    id2label: dict[int, str]  # names of the classes 0..K-1
    ignore_index: int  # label left out of losses and scores
    palette: dict[int, tuple[int, int, int]]  # a colour for each class


def load_segmentation(
    config: DataConfig, need_labels: bool = True, splits: Sequence[str] = ROLES, seed: int = 0
) -> SegmentationData:
    """Open, check and transform a segmentation set.

    Args:
        config: the `data:` section.
        need_labels: False: masks are not read, items hold `pixel_values` alone.
        splits: which of train, eval, test to load.
        seed: of the shuffle of a stream.

    Raises:
        InputError: for a set that does not exist, lacks a split or class names, or holds unusable images or masks
            (only entirely unusable splits with `on_error: skip`).
    """
    config.check_values()
    catalog = open_set(config, need_masks=need_labels)
    of_boxes = ["objects_column", "box_format", "keep_aspect", "depth"]
    of_boxes += [] if isinstance(catalog, FoundSet) else ["annotations"]  # whose outlines are drawn
    catalog.warnings += without_meaning(config, *of_boxes, where="masks")
    _, sources = together(
        lambda: catalog.labels.check_names(config, "sky") if need_labels else None,
        lambda: by_role(config, catalog, splits),
    )
    labels = catalog.labels
    augment = TrainTransform(config, labels.ignore_index)
    data = wrap(config, catalog, sources, need_labels, seed, augment, EvalTransform(config))
    data.collate = partial(segmentation_collate, ignore_index=labels.ignore_index)
    return SegmentationData(
        **vars(data), id2label=labels.id2label, ignore_index=labels.ignore_index, palette=labels.colours()
    )
