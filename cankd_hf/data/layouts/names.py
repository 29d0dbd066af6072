"""What the names of folders say: images or masks, and of which split."""

import re
from typing import NamedTuple

from cankd_hf.data.common.folders import SPLIT_NAMES

IMAGES = {
    *(
        "image",
        "images",
        "img",
        "imgs",
        "photo",
        "photos",
        "picture",
        "pictures",
        "rgb",
        "jpegimages",
        "jpegs",
        "frames",
    ),
    *("leftimg8bit", "input", "inputs", "originals", "original", "x", "raw", "data", "pngimages", "src"),
}
MASKS = {
    *("mask", "masks", "label", "labels", "labelpng", "labelspng", "labelspngs", "annotation", "annotations", "annot"),
    *("annots", "anno", "annos", "gt", "gts", "groundtruth", "groundtruths", "segmentation", "segmentations", "seg"),
    *("segs", "segmentationclass", "segmentationclassaug", "segmentationmask", "segmentationmasks", "segmask"),
    *("segmasks", "segmentationclasspng", "gtfine", "gtcoarse", "target", "targets", "semantic", "semantics", "y"),
    *(
        "labelids",
        "semanticmasks",
        "masksmachine",
        "labelmasks",
        "pixelmasks",
        "maskspng",
        "output",
        "outputs",
        "soft",
    ),
}
SPLITS = {**SPLIT_NAMES, "tr": "train", "unlabelled": "unlabelled", "unlabeled": "unlabelled"}


class Meaning(NamedTuple):
    """What a folder's name says; None where it says nothing about it."""

    kind: str | None  # "images" or "masks"
    split: str | None


def meaning(name: str) -> Meaning | None:
    """What a folder's name says, in any case, with any separators, such as `train_images`, `trainannot`, `imgs_val`;
    None if nothing."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    for split, usual in [("", None), *sorted(SPLITS.items(), key=lambda item: -len(item[0]))]:
        if split and plain == split:
            return Meaning(None, usual)
        for rest in {plain.removeprefix(split), plain.removesuffix(split)} - ({plain} if split else set()):
            if rest in IMAGES or rest in MASKS:
                return Meaning("images" if rest in IMAGES else "masks", usual)
    return None


def split_of(name: str) -> str | None:
    """The split that a folder's name says, if any."""
    found = meaning(name)
    return found.split if found else None
