"""Pascal VOC segmentation: `JPEGImages/`, `SegmentationClass/`, and `ImageSets/Segmentation/train.txt`."""

import re
from collections.abc import Mapping

from cankd_hf.data.common.files import outside, read_lines, shown
from cankd_hf.data.common.labels import NO_CLASS, Labels, colour_code
from cankd_hf.data.layouts.base import Found, Tree, canonical
from cankd_hf.data.layouts.class_tables import read_table
from cankd_hf.data.layouts.images_masks import OFFERED, paired
from cankd_hf.data.layouts.names import stem_of
from cankd_hf.data.layouts.pairs import Pairs, pairs_of
from cankd_hf.errors import InputError

NAMES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
VOID_COLOUR = (224, 224, 192)
LISTS = "ImageSets/Segmentation"
OWN_NAME = re.compile(r"20(07|08|09|10|11|12)_\d{6}")  # of the images of the challenges


class VocMasks:
    """A folder in the form of Pascal VOC, of the challenge itself or of a tool such as CVAT."""

    name = "Pascal VOC segmentation"

    def find(self, tree: Tree, need: str | None) -> Found | None:
        """The listed pairs of a folder with `JPEGImages` and `SegmentationClass`, in any case."""
        top = {name.lower() for name in tree.folders[""]}
        if not {"jpegimages", "segmentationclass"} <= top and not {"jpegimages", "segmentationclassaug"} <= top:
            return None
        pairs = pairs_of(tree) if need in OFFERED else {}
        if not pairs:
            return None
        listed = _lists(tree)
        splits = _listed(tree, pairs, listed) if listed else pairs
        labels, source = read_table(tree)
        if labels is None and _is_challenge(splits):
            labels, source = _labels(), "Pascal VOC, the 20 classes of the challenge and the background"
        return paired(self.name, tree, splits, need, labels, source)


def _labels() -> Labels:
    palette = {label: _colour(label) for label in range(len(NAMES))}
    codes = {colour_code(colour): label for label, colour in palette.items()}
    return Labels(dict(enumerate(NAMES)), palette=palette, codes=codes | {colour_code(VOID_COLOUR): NO_CLASS})


def _colour(label: int) -> tuple[int, int, int]:
    """The colour that VOC's development kit gives a label: its bits, spread over the channels from the highest on."""
    red, green, blue = (sum((label >> 3 * bit + channel & 1) << 7 - bit for bit in range(8)) for channel in range(3))
    return red, green, blue


def _is_challenge(splits: Mapping[str, Pairs]) -> bool:
    """Whether the images are called as those of the challenge."""
    names = [name for files in splits.values() for name in files.images[:20]]
    return bool(names) and all(OWN_NAME.fullmatch(stem_of(name)) for name in names)


def _lists(tree: Tree) -> dict[str, list[str]]:
    """Split -> the stems in its list; `trainval` only where there is no other."""
    folder = next((name for name in tree.files if name.lower() == LISTS.lower()), None)
    if folder is None:
        return {}
    found: dict[str, list[str]] = {}
    for name in tree.files[folder]:
        if not name.lower().endswith(".txt"):
            continue
        path = tree.path(f"{folder}/{name}")
        if problems := outside(tree.root, [path]):
            raise InputError(problems)
        # some lists name the files of both, `/JPEGImages/a.jpg /SegmentationClass/a.png`
        words = [line.split()[0] for line in read_lines(path) if line.strip()]
        found[stem_of(name)] = [stem_of(word) if "." in word else word.rpartition("/")[2] for word in words]
    chosen = {canonical(split): stems for split, stems in found.items() if stems}
    if "trainval" in chosen:
        whole = chosen.pop("trainval")
        chosen = chosen if "train" in chosen else {"train": whole, **chosen}
    return chosen


def _listed(tree: Tree, pairs: Mapping[str, Pairs], lists: Mapping[str, list[str]]) -> dict[str, Pairs]:
    """The pairs of each list. Raises InputError for what is listed and not there, all lists at once."""
    masks = {name: mask for files in pairs.values() for name, mask in zip(files.images, files.masks, strict=True)}
    images = {stem_of(name): name for name in masks}
    problems = []
    result = {}
    for split, stems in lists.items():
        lost = [stem for stem in stems if stem not in images]
        if lost:
            problems.append(
                f"{tree.root}/{LISTS}: {split}: expected an image for each of its {len(stems)} lines, got none for "
                f"{len(lost)}, first {shown(lost[0])}"
            )
        names = [images[stem] for stem in dict.fromkeys(stems) if stem in images]
        found = [masks[name] for name in names]
        result[split] = Pairs(names, found, [], sum(map(bool, found)))
    if problems:
        raise InputError(problems)
    return result
