"""Which mask belongs to which image, by the names of folders and files alone."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

from cankd_hf.data.layouts.base import Tree, canonical, is_image
from cankd_hf.data.layouts.names import RANK, Place, image_base, mask_parts, place_of, stem_of

LOSSY = (".jpg", ".jpeg")
# Of several masks of an image, by what their names say beside its: colours are to look at, instances are no classes.
BETTER = ("labeltrainids", "gtfinelabeltrainids", "gtcoarselabeltrainids")
GOOD = ("labelids", "gtfinelabelids", "gtcoarselabelids")
WORSE = ("color", "colour", "gtfinecolor", "gtcoarsecolor")
WORST = ("instanceids", "gtfineinstanceids", "gtcoarseinstanceids")


@dataclass
class File:
    """One picture."""

    name: str
    place: Place
    stem: str

    @property
    def sort_key(self) -> list[str]:
        return self.name.split("/")


@dataclass
class Pairs:
    """The images of one split with their masks."""

    images: list[str]  # all, sorted
    masks: list[str]  # "" for an image without one
    stray: list[str]  # masks without an image
    offered: int  # masks among which those of the images were looked for
    unused: dict[str, int] = field(default_factory=dict)  # other masks of the same images: what names them -> number
    double: list[str] = field(default_factory=list)  # images that share a mask

    @property
    def matched(self) -> int:
        """The images that have a mask."""
        return sum(map(bool, self.masks))


def pairs_of(tree: Tree) -> dict[str, Pairs]:
    """Split -> its pairs; a split may have images alone. Empty if there are no masks at all."""
    images, masks = _sorted_out(tree)
    if not masks:
        return {}
    masks, unused = _best(masks)
    found = _match(images, masks)
    used = {mask.name for mask in found.values()}
    by_split: dict[str, list[File]] = defaultdict(list)
    for image in images:
        mask = found.get(image.name)
        split = image.place.split or (mask.place.split if mask else None) or "train"
        by_split[canonical(split)].append(image)
    stray = [mask for mask in masks if mask.name not in used]
    whole = {canonical(file.place.split or "train") for file in masks} | by_split.keys()
    result = {}
    for split in sorted(whole):
        members = sorted(by_split.get(split, []), key=lambda image: image.sort_key)
        names = [found[image.name].name if image.name in found else "" for image in members]
        here = [mask for mask in masks if (mask.place.split is None or canonical(mask.place.split) == split)]
        lost = sorted(mask.name for mask in stray if canonical(mask.place.split or "train") == split)
        times = Counter(filter(None, names))
        double = [image.name for image, name in zip(members, names, strict=True) if times[name] > 1]
        result[split] = Pairs([image.name for image in members], names, lost, len(here), unused, double)
    return result


def _sorted_out(tree: Tree) -> tuple[list[File], list[File]]:
    """Images and masks of all splits."""
    by_kind: dict[str | None, list[list[File]]] = defaultdict(list)
    for folder, names in tree.images.items():
        place = place_of(folder)
        before = f"{folder}/" if folder else ""
        by_kind[place.kind].append([File(before + name, place, stem_of(name)) for name in names])
    masks = list(chain(*by_kind["masks"]))
    groups = {kind: by_kind[kind] for kind in ("images", None)}
    if not masks:  # they are beside their images
        apart = {kind: [_apart(files) for files in groups[kind]] for kind in groups}
        groups = {kind: [pictures for pictures, _ in apart[kind]] for kind in apart}
        masks = list(chain(*(beside for found in apart.values() for _, beside in found)))
    images = list(chain(*groups["images"]))
    named = {image.place.split for image in images}
    masked = {mask.place.split for mask in masks}
    alone = not images
    for image in chain(*groups[None]):  # folders that are not called images: `train` beside `trainannot`
        split = image.place.split
        if split is None and (not alone or None not in masked):
            continue  # such as pictures to look at
        if split not in named:
            images.append(image)
    return images, masks


def _apart(files: list[File]) -> tuple[list[File], list[File]]:
    """Images and masks that are in one folder: `a.jpg` and `a_mask.png`, or `a.jpg` and `a.png`."""
    bases = {key for file in files for key in (file.stem.lower(), image_base(file.stem))}
    photos, masks = list[File](), list[File]()
    for file in files:
        base, kind = mask_parts(file.stem)
        (masks if kind and base in bases else photos).append(file)
    # so few are more likely photographs; of `a_l` and `a_p`, which say little, about half are expected
    letters = all(len(mask_parts(file.stem)[1]) == 1 for file in masks)
    if masks and len(masks) >= (0.4 if letters else 0.02) * len(photos):
        return photos, masks
    photos = files
    stems = Counter(file.stem for file in photos)
    if 10 * sum(count == 2 for count in stems.values()) < 9 * len(stems):
        return photos, []
    jpegs = [file for file in photos if os.path.splitext(file.name)[1].lower() in LOSSY]
    if len(jpegs) != len(stems) or len({file.stem for file in jpegs}) != len(stems):
        return photos, []
    chosen = {file.name for file in jpegs}
    return jpegs, [file for file in photos if file.name not in chosen]


def _best(masks: list[File]) -> tuple[list[File], dict[str, int]]:
    """The masks of each split that are of the best kind, and the number of the others by what names them."""
    groups: dict[str | None, dict[_Group, list[File]]] = defaultdict(lambda: defaultdict(list))
    for mask in masks:
        lossy = mask.name.lower().endswith(LOSSY)
        groups[mask.place.split][_Group(mask.place.word, _kind(mask), lossy)].append(mask)
    kept, unused = list[File](), Counter[str]()
    # numbers of one kind mean the same in all splits: `labelTrainIds` of one and `labelIds` of another do not
    common = set.intersection(*({group.kind for group in kinds} for kinds in groups.values()))
    for kinds in groups.values():
        usable = [group for group in kinds if not common or group.kind in common]
        enough = 0.9 * max(len(kinds[group]) for group in usable)
        best = min((group for group in usable if len(kinds[group]) >= enough), key=_order)
        for group, files in kinds.items():
            if group == best or (group.kind == best.kind and not _same_images(files, kinds[best])):
                kept += files
            else:
                unused[f"{group.word or 'files'} {group.kind}{' (JPEG)' if group.lossy else ''}".strip()] += len(files)
    return kept, dict(unused)


class _Group(NamedTuple):
    """Masks of one sort: the name of their folder, what their names say, and whether they are JPEGs."""

    word: str
    kind: str
    lossy: bool


def _same_images(files: Sequence[File], others: Sequence[File]) -> bool:
    """Whether two groups of masks are of the same images."""
    bases = {mask_parts(mask.stem)[0] for mask in others}
    return 2 * sum(mask_parts(mask.stem)[0] in bases for mask in files) > len(files)


def _kind(mask: File) -> str:
    """What a mask's name says beside its image's; the usual words for a mask say no more than none does."""
    kind = mask_parts(mask.stem)[1]
    return kind if kind in (*BETTER, *GOOD, *WORSE, *WORST) else ""


def _order(group: _Group) -> tuple[int, bool, int]:
    quality = next((place for place, kinds in enumerate((BETTER, GOOD, ("",), WORSE)) if group.kind in kinds), 4)
    return quality, group.lossy, RANK.get(group.word, len(RANK)) if group.word else -1


def _match(images: Sequence[File], masks: Sequence[File]) -> dict[str, File]:
    """Name of an image -> its mask: by equal stems, then in any case, then without the usual additions; in the folder
    of the same name, then in the same split, then anywhere if one of them has no split."""
    forms: list[tuple[Callable[[str], str], Callable[[str], str]]] = [
        (str, str),
        (str.lower, str.lower),
        (
            str.lower,
            lambda stem: os.path.splitext(stem.lower())[0] if is_image(stem) else "",
        ),  # `a.jpg.png` of `a.jpg`
        (str.lower, lambda stem: mask_parts(stem)[0]),
        (image_base, lambda stem: mask_parts(stem)[0]),
    ]
    found: dict[str, File] = {}
    taken: set[str] = set()
    for of_image, of_mask in forms:
        for where in (lambda place: (place.split, place.rest), lambda place: place.split, lambda place: None):
            known = _once(((where(mask.place), of_mask(mask.stem)), mask) for mask in masks if mask.name not in taken)
            for image in images:
                if image.name in found:
                    continue
                mask = known.get((where(image.place), of_image(image.stem)))
                if mask is not None and (
                    where(image.place) is not None or None in (image.place.split, mask.place.split)
                ):
                    found[image.name] = mask
        taken = {mask.name for mask in found.values()}
    return found


def _once(items: Iterable[tuple[object, File]]) -> dict[object, File]:
    """The items whose key is there once."""
    result: dict[object, File] = {}
    twice = set()
    for key, file in items:
        if key in result:
            twice.add(key)
        result[key] = file
    return {key: file for key, file in result.items() if key not in twice}
