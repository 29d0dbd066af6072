"""Images and depth maps of the same names: `images/` beside `depth/`, in any order with the folders of the splits, or
side by side with names like `0001_rgb.jpg` and `0001_depth.png`."""

import os
import re
from collections.abc import Mapping
from functools import partial

from cankd_hf.data.common.files import shortened
from cankd_hf.data.common.folders import IMAGE_ENDINGS
from cankd_hf.data.common.rows import Rows
from cankd_hf.data.layouts.base import Content, Found, Split, Tree, canonical, ordered
from cankd_hf.data.layouts.elsewhere import same
from cankd_hf.data.layouts.images_masks import SCORED
from cankd_hf.data.layouts.names import IMAGES, SPLITS, place_of
from cankd_hf.errors import InputError

DEPTHS = {"depth", "depths", "depthmap", "depthmaps", "groundtruthdepth", "rawdepth", "syncdepth", "metricdepth"}
ENDINGS = {".png", ".tif", ".tiff", ".npy", ".pgm"}
OF_DEPTH = re.compile(r"[_-]depth$", re.IGNORECASE)
OF_IMAGE = re.compile(r"[_-](rgb|colors?|image|img)$", re.IGNORECASE)
Key = tuple[str, str]  # split and name, the same for an image and its depth map


class DepthMaps:
    """Images, each with a depth map."""

    name = "images and depth maps"

    def find(self, tree: Tree, need: str | None) -> Found | None:
        """The pairs of a folder; images without a depth map are left out, which is told.

        Raises:
            InputError: with all images that have several depth maps, and all splits in which hardly any has one.
        """
        if need not in (None, "depths", "images"):
            return None
        images, depths = _sides(tree)
        if not depths or not images:
            return None
        by_split: dict[str, list[Key]] = {}
        for key in images:
            by_split.setdefault(key[0], []).append(key)
        notes, left_out = _told(tree, by_split, images, depths) if need != "images" else ([], set[str]())
        splits = {
            name: Split(len(keys), partial(_read, tree, keys, images, depths))
            for name, keys in by_split.items()
            if need != "depths" or name not in left_out
        }
        return Found(self.name, ("depths", "images"), tree.root, ordered(splits), notes=notes)


def _told(
    tree: Tree, by_split: Mapping[str, list[Key]], images: Mapping[Key, list[str]], depths: Mapping[Key, list[str]]
) -> tuple[list[str], set[str]]:
    """Notes on images and depth maps that have no counterpart, and the splits without a depth map, which are left out.

    Raises:
        InputError: see `DepthMaps.find`.
    """
    notes, left_out = list[str](), set[str]()
    problems = [
        f"data.path: {images[key][0]}: expected one depth map of the same name, got {', '.join(found)}"
        for key, found in depths.items()
        if key in images and len(found) > 1
    ]
    for split, keys in by_split.items():
        bare = [images[key][0] for key in keys if key not in depths]
        stray = [names[0] for key, names in depths.items() if key[0] == split and key not in images]
        where, matched = f"{tree.root}: {split}", len(keys) - len(bare)
        if not matched and not stray and split not in SCORED:
            notes.append(f"{where}: expected a depth map for each of its {len(keys)} images, got none; it is left out")
            left_out.add(split)
        elif not matched or matched < 0.5 * min(len(keys), matched + len(stray)):
            beside = f", depth maps without an image: {', '.join(stray[:4])}" if stray else ""
            fix = "rename them, or list them in metadata.jsonl"
            problems.append(
                f"{where}: expected depth maps (png, tif or npy) named as their images are, got {matched} of "
                f"{len(keys)} images with one, first without {bare[0]}{beside}; {fix}"
            )
        elif bare:
            notes.append(
                f"{split}: {len(bare)} of {len(keys)} images have no depth map and are left out, first {bare[0]}"
            )
        if matched and stray:
            notes.append(f"{split}: {len(stray)} depth maps have no image and are not used, first {stray[0]}")
    if problems:
        raise InputError(shortened(problems))
    return notes, left_out


def _sides(tree: Tree) -> tuple[dict[Key, list[str]], dict[Key, list[str]]]:
    """The images and the depth maps of a folder."""
    images: dict[Key, list[str]] = {}
    depths: dict[Key, list[str]] = {}
    for folder, names in tree.files.items():
        words = [re.sub(r"[^a-z0-9]", "", part.lower()) for part in folder.split("/") if part]
        split = next((SPLITS[word] for word in words if word in SPLITS), "train")
        if place_of(folder).kind == "masks" and not any(word in DEPTHS for word in words):
            continue
        beside = [word for word in words if word not in SPLITS and word not in DEPTHS and word not in IMAGES]
        for name in names:
            stem, ending = os.path.splitext(name)
            of_depth = any(word in DEPTHS for word in words) or OF_DEPTH.search(stem) is not None
            if ending.lower() not in (ENDINGS if of_depth else IMAGE_ENDINGS):
                continue
            plain = OF_IMAGE.sub("", OF_DEPTH.sub("", stem))
            side = depths if of_depth else images
            side.setdefault((canonical(split), same("/".join([*beside, plain]))), []).append(
                f"{folder}/{name}".lstrip("/")
            )
    return images, depths


def _read(tree: Tree, keys: list[Key], images: Mapping[Key, list[str]], depths: Mapping[Key, list[str]]) -> Content:
    """The images of a split in the order of their names, with the names of their depth maps."""
    keys = sorted(keys)
    pairs = [(images[key][0], next(iter(depths.get(key, ())), "")) for key in keys]
    if problems := tree.refuse_links([name for pair in pairs for name in pair if name]):
        raise InputError(shortened(problems))
    return Content(Rows(tree.root, [image for image, _ in pairs], [depth for _, depth in pairs]))
