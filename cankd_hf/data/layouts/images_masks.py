"""Folders of images and of masks whose files have equal stems, under the names that people give them."""

from collections.abc import Mapping, Sequence
from functools import partial

from cankd_hf.data.common.files import shortened
from cankd_hf.data.common.labels import Labels
from cankd_hf.data.common.rows import Rows
from cankd_hf.data.layouts.base import Content, Found, Split, Tree, ordered
from cankd_hf.data.layouts.class_tables import read_table
from cankd_hf.data.layouts.names import stem_of
from cankd_hf.data.layouts.pairs import Pairs, pairs_of
from cankd_hf.errors import InputError

OFFERED = (None, "masks", "images")  # needs that sets of masks meet
SCORED = ("train", "validation")  # splits that are of no use without masks


class ImagesAndMasks:
    """`images/` and `masks/`, with split folders above or below them, or both in one folder."""

    name = "images and masks"

    def find(self, tree: Tree, need: str | None) -> Found | None:
        """The pairs of a folder that has masks."""
        pairs = pairs_of(tree) if need in OFFERED else {}
        if not pairs:
            return None
        table, source = read_table(tree)
        return paired(self.name, tree, pairs, need, table, source)


def paired(
    name: str, tree: Tree, pairs: Mapping[str, Pairs], need: str | None, labels: Labels | None, label_source: str
) -> Found:
    """The set of these pairs.

    Splits without a single mask are left out where masks are needed, but for training and validation, which lack
    something then. Raises InputError with the problems of all splits.
    """
    problems, notes = list[str](), list[str]()
    splits: dict[str, Split] = {}
    for split, files in pairs.items():
        where = f"{tree.root}: {split}"
        if not files.images:
            problems.append(f"{where}: expected images for its {len(files.stray)} masks, got none")
        elif not files.offered and need == "masks":
            (problems if split in SCORED else notes).append(
                f"{where}: expected a mask for each of its {len(files.images)} images, got none"
                + ("; it is left out" if split not in SCORED else "")
            )
            if split not in SCORED:
                continue
        elif files.offered and files.matched < 0.5 * min(len(files.images), files.offered):
            problems.append(f"{where}: {_few(files)}")
        notes += _told(split, files) if need != "images" else []  # which all images are then
        splits[split] = Split(len(files.images), partial(_read, tree, files))
    problems += tree.linked
    if problems:
        raise InputError(shortened(problems))
    unused = {word: count for files in pairs.values() for word, count in files.unused.items()}
    if unused and need != "images":
        said = ", ".join(f"{word} ({count} files)" for word, count in unused.items())
        notes.append(f"other masks of the same images are not used: {said}")
    return Found(name, ("masks", "images"), tree.root, ordered(splits), labels, notes, label_source)


def _few(files: Pairs) -> str:
    """What to say where hardly any image has a mask."""
    images = _some([name for name, mask in zip(files.images, files.masks, strict=True) if not mask])
    masks = _some(files.stray)
    return (
        f"expected masks named as their images are, got {files.matched} of {len(files.images)} images with one; the "
        f"others are {images}, masks without an image {masks or 'none'}; rename them, or list them in metadata.jsonl"
    )


def _some(files: Sequence[str]) -> str:
    """The first names of many files, whole."""
    return ", ".join([*map(stem_of, files[:4]), *(["..."] if len(files) > 4 else [])])


def _told(split: str, files: Pairs) -> list[str]:
    """What is left out of a split."""
    told = []
    if files.stray and files.images:
        told.append(f"{split}: {len(files.stray)} masks have no image and are not used, first {files.stray[0]}")
    lacking = len(files.images) - files.matched
    if lacking and files.matched:
        first = next(name for name, mask in zip(files.images, files.masks, strict=True) if not mask)
        told.append(f"{split}: {lacking} of {len(files.images)} images have no mask and are left out, first {first}")
    lossy = [name for name in files.masks if name.lower().endswith((".jpg", ".jpeg"))]
    if lossy:
        told.append(
            f"{split}: {len(lossy)} masks are JPEG files, whose compression changes values along edges, first "
            f"{lossy[0]}; where classes come out that are none, save masks as PNG"
        )
    if files.double:
        told.append(f"{split}: {len(files.double)} images share a mask, as they have one stem: {files.double[0]}, ...")
    return told


def _read(tree: Tree, files: Pairs) -> Content:
    """Images and masks of a split, none of them a link out of the folder."""
    if problems := tree.refuse_links([*files.images, *filter(None, files.masks)]):
        raise InputError(shortened(problems))
    return Content(Rows(tree.root, files.images, files.masks))


def sample(names: Sequence[str], count: int) -> list[str]:
    """Some of many, spread evenly."""
    return list(names[:: max(1, len(names) // count)])[:count]
