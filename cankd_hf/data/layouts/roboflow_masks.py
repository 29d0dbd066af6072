"""Semantic masks as Roboflow exports them: `x.jpg` with `x_mask.png` beside it, and `_classes.csv`."""

import csv
from collections.abc import Sequence
from functools import partial

from cankd_hf.data.common.files import read_lines, shortened, shown
from cankd_hf.data.common.labels import Labels
from cankd_hf.data.common.rows import Rows
from cankd_hf.data.layouts.base import Content, Found, Split, Tree, ordered
from cankd_hf.data.layouts.elsewhere import join, split_of, stem
from cankd_hf.errors import InputError

CLASSES = "_classes.csv"
ENDING = "_mask"


class RoboflowMasks:
    """The export "Semantic Segmentation Masks" of Roboflow."""

    name = "Roboflow masks"

    def find(self, tree: Tree, need: str | None) -> Found | None:
        masks = {
            folder: found
            for folder, names in tree.images.items()
            if (found := {stem(name).removesuffix(ENDING): name for name in names if stem(name).endswith(ENDING)})
        }
        lists = [file for folder in masks if (file := tree.find(CLASSES, folder=folder))]
        if not lists:
            return None
        problems, notes = list[str](), list[str]()
        named = [_classes(tree, file, problems) for file in lists]
        if any(names != named[0] for names in named):
            problems.append(f"{tree.root}: expected the same classes in {', '.join(lists)}, got others; correct them")
        parts: dict[str, list[tuple[str, str]]] = {}
        for folder, found in masks.items():
            images = [name for name in tree.images[folder] if not stem(name).endswith(ENDING)]
            part = parts.setdefault(split_of(folder) or "train", [])
            part += [
                (join(folder, name), join(folder, found[stem(name)]) if stem(name) in found else "") for name in images
            ]
            if alone := sorted(found.keys() - {stem(name) for name in images}):
                first = join(folder, found[alone[0]])
                notes.append(f"{len(alone)} masks in {folder or tree.root} belong to no image, first {first}")
        problems += tree.refuse_links([name for part in parts.values() for pair in part for name in pair if name])
        if problems:
            raise InputError(shortened(problems))
        splits = {name: Split(len(part), partial(_content, tree, part)) for name, part in parts.items()}
        labels = Labels(named[0])
        return Found(self.name, ("masks", "images"), tree.root, ordered(splits), labels, notes, lists[0])


def _content(tree: Tree, part: Sequence[tuple[str, str]]) -> Content:
    return Content(Rows(tree.root, (image for image, _ in part), (mask for _, mask in part)))


def _classes(tree: Tree, file: str, problems: list[str]) -> dict[int, str]:
    """The classes in a file, by the values of their pixels."""
    if links := tree.refuse_links([file]):
        problems += links
        return {}
    try:
        lines = list(csv.reader(read_lines(tree.path(file))))
    except csv.Error as error:
        problems.append(f"{file}: expected a csv file, got one that does not parse: {error}")
        return {}
    found: dict[int, str] = {}
    for number, line in enumerate(lines[1:], start=2):
        words = [word.strip() for word in line]
        if len(words) != 2 or not (words[0].isascii() and words[0].isdigit()) or not words[1]:
            if any(words):
                problems.append(f"{file} line {number}: expected `Pixel Value, Class`, got {shown(','.join(line))}")
            continue
        found[int(words[0])] = words[1]
    if sorted(found) != [*range(len(found))]:
        problems.append(f"{file}: expected the values 0..K-1 without a gap, got {shown(sorted(found))}")
    return dict(sorted(found.items()))
