"""Loads images without labels, for label-free distillation."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.dataset import ImageDataset, StreamSource
from cankd_hf.data.common.opening import open_set, without_meaning
from cankd_hf.data.common.sources import ROLES, TaskData, by_role, find_split, wrap
from cankd_hf.data.common.unlabelled import WithUnlabelled
from cankd_hf.data.segmentation.collate import segmentation_collate
from cankd_hf.data.segmentation.transforms import EvalTransform, TrainTransform
from cankd_hf.errors import InputError

logger = logging.getLogger(__name__)


def load_images(config: DataConfig, splits: Sequence[str] = ROLES, seed: int = 0) -> TaskData:
    """Open, check and transform any set of images, labels or not, for label-free distillation.

    Without a validation split, every n-th training image is held out, so that about `config.holdout` of them are.
    Raises InputError for a set that does not exist or holds unusable images (see `load_segmentation`).
    """
    config.check_values()
    catalog = open_set(config, need_masks=False)
    wanted = config.eval_split
    lacking = wanted is None or find_split(wanted, catalog.names()) is None
    asked = replace(config, eval_split=None) if lacking else config  # held out here, by another rule
    sources = by_role(asked, catalog, [role for role in splits if not (role == "eval" and lacking)])
    if "eval" in splits and lacking:
        train = sources.get("train") or by_role(asked, catalog, ["train"])["train"]
        if isinstance(train[0], StreamSource):
            raise InputError("data.eval_split: a stream cannot be split; name a split for validation")
        every = max(2, round(1 / config.holdout))
        if len(train[1]) < 2:
            raise InputError(f"data: expected at least 2 images to hold one out for validation, got {len(train[1])}")
        sources["eval"] = (train[0], train[1][::every])
        if "train" in splits:
            held = set(sources["eval"][1])
            sources["train"] = (train[0], [index for index in train[1] if index not in held])
    streamed = any(isinstance(source, StreamSource) for source, _ in sources.values())
    if not streamed:
        catalog.warnings += without_meaning(config, "unlabelled_ratio", where="images that are all without labels")
    data = wrap(config, catalog, sources, False, seed, TrainTransform(config), EvalTransform(config))
    if data.unlabelled is not None and not streamed:
        data.train, data.unlabelled = WithUnlabelled(data.train, data.unlabelled, None), None
    data.collate = segmentation_collate
    if isinstance(data.eval, ImageDataset):
        data.probe = _with_masks(config, data.eval, "train" if lacking else "eval")
    return data


def _with_masks(config: DataConfig, held: ImageDataset, role: str) -> ImageDataset | None:
    """The held-out images of a role's split with their masks, for a probe; None where they have none."""
    try:
        catalog = open_set(config, need_masks=True)
        asked = replace(config, eval_split=None) if role == "train" else config
        source, _ = by_role(asked, catalog, [role])[role]
    except InputError as error:
        logger.info("no probe of the student's features, as there are no masks: %s", error)
        return None
    if isinstance(source, StreamSource) or len(source) != len(held.source):
        logger.info("no probe of the student's features, as not all images have a mask")
        return None
    return ImageDataset(source, EvalTransform(config), held.indices, on_error="skip")
