"""A folder of images without labels, flat or in folders; split folders at its top are splits."""

from functools import partial

from cankd_hf.data.common.files import shortened
from cankd_hf.data.common.folders import MASK_FOLDERS
from cankd_hf.data.common.rows import Rows
from cankd_hf.data.layouts.base import Content, Found, Split, Tree, canonical, ordered
from cankd_hf.errors import InputError


class Flat:
    """Images alone."""

    name = "images without labels"

    def find(self, tree: Tree, need: str | None) -> Found | None:
        """The images of a folder, if it has any outside of folders of masks."""
        from cankd_hf.data.layouts.names import split_of

        by_split: dict[str, list[str]] = {}
        for folder, names in tree.images.items():
            parts = folder.split("/") if folder else []
            if any(part.lower() in MASK_FOLDERS for part in parts):
                continue
            split = next((found for part in parts if (found := split_of(part))), "train")
            by_split.setdefault(canonical(split), []).extend(f"{folder}/{name}".lstrip("/") for name in names)
        if not by_split:
            return None
        splits = {name: Split(len(files), partial(_read, tree, files)) for name, files in by_split.items()}
        return Found(self.name, ("images",), tree.root, ordered(splits))


def _read(tree: Tree, files: list[str]) -> Content:
    """The images, sorted as by their parts."""
    if problems := tree.refuse_links(files):
        raise InputError(shortened(problems))
    return Content(Rows(tree.root, sorted(files, key=lambda name: name.split("/"))))
