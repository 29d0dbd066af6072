"""Cityscapes: `leftImg8bit/train/CITY/*_leftImg8bit.png` and `gtFine/train/CITY/*_gtFine_labelIds.png`.

The classes are those of the benchmark (https://github.com/mcordts/cityscapesScripts, helpers/labels.py): 19 of 34 ids.
"""

import numpy as np

from cankd_hf.data.common.decode import Decoder, Unusable
from cankd_hf.data.common.labels import NO_CLASS, Labels, colour_code
from cankd_hf.data.layouts.base import Found, Tree
from cankd_hf.data.layouts.images_masks import OFFERED, paired
from cankd_hf.data.layouts.names import mask_parts, stem_of
from cankd_hf.data.layouts.pairs import BETTER, GOOD, WORSE, Pairs, pairs_of

# name, id in labelIds, colour; in the order of the train ids 0..18
CLASSES = (
    ("road", 7, (128, 64, 128)),
    ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)),
    ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)),
    ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)),
    ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)),
    ("car", 26, (0, 0, 142)),
    ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)),
    ("bicycle", 33, (119, 11, 32)),
)
VOID_COLOURS = (
    *((0, 0, 0), (111, 74, 0), (81, 0, 81), (250, 170, 160), (230, 150, 140), (180, 165, 180), (150, 100, 100)),
    *((150, 120, 90), (0, 0, 90), (0, 0, 110)),
)


class Cityscapes:
    """Cityscapes as it is downloaded, or with `labelTrainIds` made of it."""

    name = "Cityscapes"

    def find(self, tree: Tree, need: str | None) -> Found | None:
        """The pairs, if the images are called as those of Cityscapes are."""
        if not any(stem_of(names[0]).endswith("_leftImg8bit") for names in tree.images.values()):
            return None
        pairs = pairs_of(tree) if need in OFFERED else {}
        first = next((name for files in pairs.values() for name in files.masks if name), None)
        kind = mask_parts(stem_of(first))[1] if first else ""
        if kind not in (*BETTER, *GOOD, *WORSE):
            return None
        labels = _labels(kind)
        hidden = [split for split, files in pairs.items() if _hidden(tree, files, labels)]
        kept = {split: files for split, files in pairs.items() if split not in hidden or need != "masks"}
        found = paired(self.name, tree, kept, need, labels, "Cityscapes, the 19 classes of its benchmark")
        found.notes += [f"{split}: its masks are void alone, as those of the benchmark's test are" for split in hidden]
        return found


def _labels(kind: str) -> Labels:
    """The classes of masks of a kind: `labelids`, `labeltrainids`, or colours."""
    labels = Labels(
        {label: name for label, (name, _, _) in enumerate(CLASSES)},
        palette={label: colour for label, (_, _, colour) in enumerate(CLASSES)},
    )
    if kind in GOOD:
        labels.values = dict.fromkeys([*range(34), 255], NO_CLASS)
        labels.values |= {number: label for label, (_, number, _) in enumerate(CLASSES)}
    elif kind in WORSE:
        labels.codes = {colour_code(colour): NO_CLASS for colour in VOID_COLOURS}
        labels.codes |= {colour_code(colour): label for label, colour in labels.palette.items()}
    return labels


def _hidden(tree: Tree, files: Pairs, labels: Labels) -> bool:
    """Whether the first masks of a split hold no class: those of the test split are kept by the benchmark."""
    chosen = [name for name in files.masks if name][:3]
    decoder = Decoder(ignore_index=labels.ignore_index, values=labels.values, codes=labels.codes)
    for name in chosen:
        try:
            if (np.asarray(decoder.mask(tree.path(name), name)) != labels.ignore_index).any():
                return False
        except Unusable:
            return False
    return bool(chosen)
