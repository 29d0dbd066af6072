"""What names of folders and files say: images or masks, of which split, of which image."""

import re
import unicodedata
from functools import lru_cache
from typing import NamedTuple

from cankd_hf.data.common.folders import SPLIT_NAMES, YEAR

# In lower case without separators. Of several folders of masks, the first in this order is taken.
MASKS = (
    *("masks", "mask", "segmentationclass", "segmentationclassaug", "segmentationclasspng", "labels", "label"),
    *("annotations", "annotation", "annots", "annot", "annos", "anno", "gtfine", "gtcoarse", "groundtruth"),
    *("groundtruths", "gt", "gts", "segmentation", "segmentations", "seg", "segs", "segmentationmask"),
    *("segmentationmasks", "segmasks", "segmask", "semanticmasks", "labelmasks", "pixelmasks", "maskspng"),
    *("labelpng", "labelspng", "labelspngs", "labelids", "labelimages", "maskimages", "semantic", "semantics"),
    *("targets", "target", "outputs", "output"),
)
IMAGES = (
    *("images", "image", "imgs", "img", "jpegimages", "leftimg8bit", "photos", "photo", "pictures", "picture"),
    *("pngimages", "jpegs", "rgb", "frames", "originalimages", "originals", "original", "inputs", "input", "image2"),
)
SPLITS = {**SPLIT_NAMES, "unlabelled": "unlabelled", "unlabeled": "unlabelled", "unsupervised": "unsupervised"}
RANK = {word: place for place, word in enumerate(MASKS)}

# Words that say what a folder holds even with others beside them.
_CLEAR = {
    *(
        "images",
        "image",
        "imgs",
        "img",
        "photos",
        "masks",
        "mask",
        "labels",
        "label",
        "annotations",
        "groundtruth",
        "gt",
    ),
    *("input", "inputs"),
}
_SET = re.compile(r"(data)?(set|split|data)s?$")

# What the names of files have beside that of their image.
_OF_MASKS = (
    r"gt(fine|coarse)_label(train)?ids|label_?(train)?ids|gt(fine|coarse)_color|colou?r|seg(mentation)?_?(mask)?s?"
    r"|masks?|gt|ground_?truth|labels?|lbl|annotations?|annot?|anno|l|p|gt(fine|coarse)_instance_?ids|instance_?ids"
)
_OF_IMAGES = r"leftimg8bit|images?|imgs?|im|rgb|photo|picture|frame|sat|original|orig|raw|input"
_SEPARATOR = r"[ _.\-]+"
MASK_END = re.compile(rf"^(?P<base>.+?){_SEPARATOR}(?P<kind>{_OF_MASKS})$")
MASK_START = re.compile(rf"^(?P<kind>masks?|gt|labels?|seg(mentation)?){_SEPARATOR}?(?=[\d_ .\-(])(?P<base>.+)$")
IMAGE_END = re.compile(rf"^(?P<base>.+?){_SEPARATOR}({_OF_IMAGES})$")
IMAGE_START = re.compile(rf"^({_OF_IMAGES}){_SEPARATOR}?(?=[\d_ .\-(])(?P<base>.+)$")


class Meaning(NamedTuple):
    """What a folder's name says; None where it says nothing about it."""

    kind: str | None  # "images" or "masks"
    split: str | None
    word: str = ""  # what says the kind, with what is beside it
    rest: str = ""  # what is beside it: `512` in `images_512`


@lru_cache(maxsize=4096)
def meaning(name: str) -> Meaning | None:
    """What a folder's name says, in any case, with any separators, such as `train_images`, `trainannot`, `imgs_val`,
    `val2017`, `training_set`, `masks_512`; None if nothing."""
    low = YEAR.sub("", name.lower())
    plain = re.sub(r"[\W_]", "", low)
    alone = _SET.sub("", plain)
    if alone in SPLITS:
        return Meaning(None, SPLITS[alone])
    if kind := _kind(plain):
        return Meaning(kind, None, plain)
    for split in sorted(SPLITS, key=len, reverse=True):
        for word in (plain.removeprefix(split), plain.removesuffix(split)):
            if word != plain and (kind := _kind(YEAR.sub("", word))):
                return Meaning(kind, SPLITS[split], word)
    parts = re.split(r"[\W_]+", low)
    said = next((_kind(part) for part in reversed(parts) if part in _CLEAR), None)
    of_split = next((SPLITS[part] for part in parts if part in SPLITS), None)
    rest = "_".join(part for part in parts if part not in _CLEAR and part not in SPLITS)
    return Meaning(said, of_split, plain, rest) if said else None


def _kind(word: str) -> str | None:
    return "images" if word in IMAGES else "masks" if word in MASKS else None


def split_of(name: str) -> str | None:
    """The split that a folder's name says, if any."""
    found = meaning(name)
    return found.split if found else None


class Place(NamedTuple):
    """What the names of a folder and those above it say together."""

    kind: str | None
    split: str | None
    rest: tuple[str, ...]  # names that say nothing, such as those of cities
    word: str


@lru_cache(maxsize=65536)
def place_of(folder: str) -> Place:
    """What a folder says by its path; the innermost name that says a kind counts, and the outermost split."""
    kind = split = None
    word, rest = "", []
    for part in folder.split("/") if folder else []:
        found = meaning(part)
        if found is None:
            rest.append(part)
            continue
        kind, word = (found.kind, found.word) if found.kind else (kind, word)
        rest += [found.rest] if found.rest else []
        split = split or found.split
    return Place(kind, split, tuple(rest), word)


def stem_of(name: str) -> str:
    """The name of a file without folders and ending, in the one form of its letters (macOS writes another)."""
    stem = name.rpartition("/")[2].rpartition(".")[0]
    return stem if stem.isascii() else unicodedata.normalize("NFC", stem)


def mask_parts(stem: str) -> tuple[str, str]:
    """The part of a mask's stem that names its image, in lower case, and what it says beside (`labelids`), or ""."""
    low = stem.lower()
    found = MASK_END.match(low) or MASK_START.match(low)
    return (found["base"], re.sub(r"[ _.\-]", "", found["kind"])) if found else (low, "")


def image_base(stem: str) -> str:
    """The part of an image's stem that its mask has too, in lower case."""
    low = stem.lower()
    found = IMAGE_END.match(low) or IMAGE_START.match(low)
    return found["base"] if found else low
