"""A folder of images without labels, flat or in folders; split folders at its top are splits."""

from functools import partial

from cankd_hf.data.common.files import shortened
from cankd_hf.data.common.rows import Rows
from cankd_hf.data.layouts.base import Content, Found, Split, Tree, canonical, ordered
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
        return Found(self.name, ("images",), tree.root, ordered(splits))


def _read(tree: Tree, files: list[str]) -> Content:
    """The images, sorted as by their parts."""
    if problems := tree.refuse_links(files):
        raise InputError(shortened(problems))
    return Content(Rows(tree.root, sorted(files, key=lambda name: name.split("/"))))
