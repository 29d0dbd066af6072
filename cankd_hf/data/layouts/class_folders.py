"""A folder of images for each class, below folders of splits or not: the layout of torchvision's `ImageFolder`."""

import unicodedata
from collections.abc import Mapping
from functools import partial

from cankd_hf.data.common.files import shortened
from cankd_hf.data.common.labels import Labels
from cankd_hf.data.common.rows import Rows
from cankd_hf.data.layouts.base import Content, Found, Split, Tree, canonical, ordered
from cankd_hf.data.layouts.names import SPLITS, meaning
from cankd_hf.errors import InputError


class ClassFolders:
    """Images in folders named by their class."""

    name = "a folder of images for each class"

    def find(self, tree: Tree, need: str | None) -> Found | None:
        """The classes of a folder. Raises InputError with all classes that only some splits have, as their names would
        number the classes in another order."""
        if need not in (None, "classes"):
            return None
        by_split = _classes(tree)
        if not by_split or (need is None and not _clearly(by_split)):
            return None
        names = sorted({name for classes in by_split.values() for name in classes})
        if len(names) < 2 or all((said := meaning(name)) and said.kind for name in names):  # images/ and masks/
            return None
        train = by_split.get("train") or next(iter(by_split.values()))
        strange = [
            f"data.path: {split}/{name}: expected a class of the training images ({', '.join(sorted(train)[:8])}), "
            "got one that they do not have; add images of it, or remove the folder"
            for split, classes in by_split.items()
            for name in sorted(classes.keys() - train.keys())
        ]
        if strange and need == "classes":
            raise InputError(shortened(strange))
        splits = {
            split: Split(sum(map(len, classes.values())), partial(_read, tree, classes, names))
            for split, classes in by_split.items()
        }
        labels = Labels(dict(enumerate(names)))
        outside = [
            f"{folder}/{name}".lstrip("/")
            for folder in tree.images
            if not _parts(folder)[1]
            for name in tree.images[folder]
        ]
        notes = (
            [f"{len(outside)} images lie in no class's folder and are left out, first {outside[0]}"] if outside else []
        )
        return Found(
            self.name,
            ("classes", "images"),
            tree.root,
            ordered(splits),
            labels,
            label_source="the names of the folders",
            notes=notes,
        )


def _classes(tree: Tree) -> dict[str, dict[str, list[str]]]:
    """Split -> class -> its images. The first folder that is no split's names the class."""
    found: dict[str, dict[str, list[str]]] = {}
    for folder, names in tree.images.items():
        split, rest = _parts(folder)
        if rest:
            label = unicodedata.normalize("NFC", rest[0])  # macOS writes another form of accented letters
            found.setdefault(split, {}).setdefault(label, []).extend(f"{folder}/{name}" for name in names)
    return found


def _parts(folder: str) -> tuple[str, list[str]]:
    """The split of a folder, and the names below it."""
    first, *rest = parts = folder.split("/") if folder else [""]
    return (canonical(SPLITS[first.lower()]), rest) if first.lower() in SPLITS else ("train", parts if first else [])


def _clearly(by_split: Mapping[str, Mapping[str, list[str]]]) -> bool:
    """Whether folders are rather classes than anything else: several, alike in all splits, none with a usual name."""
    first, *others = (set(classes) for classes in by_split.values())
    return len(first) > 1 and all(one <= first for one in others) and not any(map(meaning, first))


def _read(tree: Tree, classes: Mapping[str, list[str]], names: list[str]) -> Content:
    """The images of a split, sorted by class and name, each with the number of its class."""
    pairs = sorted((file, names.index(name)) for name, files in classes.items() for file in files)
    if problems := tree.refuse_links([file for file, _ in pairs]):
        raise InputError(shortened(problems))
    return Content(Rows(tree.root, [file for file, _ in pairs]), classes=[label for _, label in pairs])
