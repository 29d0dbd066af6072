"""A folder of images without labels, flat or in folders; split folders at its top are splits."""

import os
from functools import partial

from cankd_hf.data.common.files import shortened
from cankd_hf.data.common.rows import Rows
from cankd_hf.data.layouts.base import Content, Found, Split, Tree, canonical, ordered
from cankd_hf.data.layouts.elsewhere import join
from cankd_hf.data.layouts.names import place_of
from cankd_hf.errors import InputError


class Flat:
    """Images alone."""

    name = "images without labels"

    def find(self, tree: Tree, need: str | None) -> Found | None:
        """The images of a folder, those in folders of masks only if there are no others."""
        pictures = {folder: names for folder, names in tree.images.items() if place_of(folder).kind != "masks"}
        by_split: dict[str, list[str]] = {}
        for folder, names in (pictures or tree.images).items():
            split = canonical(place_of(folder).split or "train")
            by_split.setdefault(split, []).extend(f"{folder}/{name}".lstrip("/") for name in names)
        if not by_split:
            return None
        splits = {name: Split(len(files), partial(_read, tree, files)) for name, files in by_split.items()}
        found = Found(self.name, ("images",), tree.root, ordered(splits))
        others = [join(folder, name) for folder, names in tree.files.items() for name in names if _of_labels(name)]
        if others and need is None:
            found.notes.append(
                f"{len(others)} files that could hold labels are of no layout that is read, first {others[0]}; "
                "name the labels with --task, which says what is wrong"
            )
        return found


def _of_labels(name: str) -> bool:
    """Whether a file may have been meant to hold labels, by its name."""
    stem, ending = os.path.splitext(name.lower())
    return ending in (".json", ".jsonl", ".txt", ".xml", ".csv") and not stem.startswith(("readme", "licen"))


def _read(tree: Tree, files: list[str]) -> Content:
    """The images, sorted as by their parts."""
    if problems := tree.refuse_links(files):
        raise InputError(shortened(problems))
    return Content(Rows(tree.root, sorted(files, key=lambda name: name.split("/"))))
