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
        """The pairs of a folder. Raises InputError with all images that have no depth map, or several."""
        if need not in (None, "depths", "images"):
            return None
        images, depths = _sides(tree)
        if not depths or not images:
            return None
        missing = [key for key in images if len(depths.get(key, ())) != 1]
        if missing and need == "depths":
            raise InputError(
                shortened(
                    [
                        f"data.path: {images[key][0]}: expected one depth map (png, tif or npy) of the same name, got "
                        f"{', '.join(depths.get(key, ())) or 'none'}"
                        for key in missing
                    ]
                )
            )
        by_split: dict[str, list[Key]] = {}
        for key in images:
            by_split.setdefault(key[0], []).append(key)
        splits = {
            name: Split(len(keys), partial(_read, tree, keys, images, depths)) for name, keys in by_split.items()
        }
        notes = [f"{len(missing)} images have no depth map, first {images[missing[0]][0]}"] if missing else []
        return Found(self.name, ("depths", "images"), tree.root, ordered(splits), notes=notes)


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
