"""YOLO: label files with the stems of the images, in `labels/` for `images/`, or beside them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from cankd_hf.data.common.files import outside, read_lines, shortened
from cankd_hf.data.common.labels import Labels
from cankd_hf.data.common.rows import Rows
from cankd_hf.data.detection.objects import Annotation
from cankd_hf.data.detection.outlines import Outlines
from cankd_hf.data.detection.table import AnnotationTable
from cankd_hf.data.layouts.base import Content, Found, Split, Tree, canonical, is_image, ordered
from cankd_hf.data.layouts.coco import covered, mask_labels
from cankd_hf.data.layouts.drawn import DrawnMasks
from cankd_hf.data.layouts.elsewhere import NOT_IMAGES, Elsewhere, join, same, split_of, stem, upright_size
from cankd_hf.data.layouts.yolo_labels import Line, annotation_of, label_lines, unknown
from cankd_hf.data.layouts.yolo_yaml import NAME_FILES, Description, described, names_beside, repeated
from cankd_hf.errors import InputError

LABEL_FOLDERS = ("labels", "label", "annotations", "labels_yolo", "txt")
LOOKED_AT = 50  # label files, of which one with an object says that they are label files


class LabelFiles:
    """The label files of a tree by their images."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self._known = {same(folder): folder for folder in tree.files}
        self._places: dict[str, list[str]] = {}
        self.stems = {
            folder: {stem(name): name for name in files if name.lower().endswith(".txt")}
            for folder, files in tree.files.items()
        }

    def of(self, image: str) -> str | None:
        """The label file of an image, if it has one."""
        folder, _, name = image.rpartition("/")
        key = stem(name)
        for place in self._places_for(folder):
            if key in self.stems[place]:
                return join(place, self.stems[place][key])
        return None

    def _places_for(self, folder: str) -> list[str]:
        """The folders that may hold the label files of the images in a folder, the likeliest first."""
        if folder not in self._places:
            parts = [same(part) for part in folder.split("/")] if folder else []
            replaced = [
                "/".join([*parts[:n], label, *parts[n + 1 :]])
                for n in reversed(range(len(parts)))
                for label in LABEL_FOLDERS
                if parts[n] in ("images", "image", "img", "imgs", "jpegimages")
            ]
            inside = ["/".join([*parts, label]) for label in LABEL_FOLDERS]
            found = (self._known.get(key) for key in (*replaced, *inside))
            self._places[folder] = list(dict.fromkeys([*(one for one in found if one is not None), folder]))
        return self._places[folder]

    def unmatched(self, images: Iterable[str]) -> list[str]:
        """Label files beside those of the images that belong to none."""
        used = {file for image in images if (file := self.of(image))}
        folders = {file.rpartition("/")[0] for file in used}
        names = {join(folder, name) for folder in folders for name in self.stems[folder].values()}
        return sorted(file for file in names - used if not _is_other(file))


class Yolo:
    """The layout of Ultralytics, Roboflow, darknet, LabelImg, CVAT and Label Studio."""

    name = "YOLO"

    def find(self, tree: Tree, need: str | None) -> Found | None:
        problems: list[str] = []
        files, said = LabelFiles(tree), described(tree, problems)
        images = [join(folder, name) for folder, names in tree.images.items() for name in names]
        labelled = [file for image in images if (file := files.of(image)) is not None]
        columns = {_columns(tree, file) for file in labelled[:: max(1, len(labelled) // LOOKED_AT)]} - {0}
        if not columns and (said is None or not (said.splits or said.base)):  # names alone fit any layout
            return None
        said, notes = said or Description(), list[str]()
        listed = _described_splits(tree, said, problems, notes) if said.splits else _by_folder(images, files)
        used = list(dict.fromkeys(image for part in listed.values() for image in part))
        if used and not labelled:
            problems.append(
                f"{tree.root}: expected label files, such as `labels/{stem(used[0])}.txt` for {used[0]}, got none for "
                f"{len(used)} images"
            )
        links = tree.refuse_links([*used, *labelled])
        problems += links
        names, source = _names(tree, said, labelled, problems)
        problems += repeated(names, source)
        if problems or not used:
            problems += [] if links else _of_lines(tree, labelled, said.keypoints)
            raise InputError(shortened(problems) or f"{tree.root}: expected images of a YOLO set, got none")
        if left := sorted(image for image in {*images} - {*used} if files.of(image)):
            notes.append(f"{len(left)} images are in no split of {said.file} and are not used, first {left[0]}")
        if not source:  # told with `labels.json`, unless that is there
            names = _counted(tree, labelled, said.keypoints)
        if left := files.unmatched(images):
            notes.append(f"{len(left)} label files belong to no image and are not used, first {left[0]}")
        labels, fill = Labels(dict(enumerate(names.values())), ids=list(names)), None
        outlined = max(columns, default=0) > 5 and not said.keypoints
        if need == "masks" and outlined:
            labels, fill = mask_labels(list(names.values()))
            notes.append(covered(labels, fill))
        shift = len(labels.id2label) - len(names)
        reading = _Reading(tree, files, list(names), said.keypoints, fill, shift, need == "instances")
        splits = {name: Split(len(part), partial(reading.read, part)) for name, part in listed.items()}
        kinds = ("boxes", "instances", "masks", "images") if outlined else ("boxes", "images")
        return Found(self.name, kinds, tree.root, ordered(splits), labels, notes, source)


@dataclass(frozen=True)
class _Reading:
    """Reads the objects of images."""

    tree: Tree
    files: LabelFiles
    ids: Sequence[int]  # of the classes in the files
    keypoints: int
    fill: int | None  # of masks that are drawn: the label of the pixels outside of all outlines
    shift: int  # classes before those of the files
    instances: bool = False  # whether objects are read with their outlines

    def read(self, images: Sequence[str]) -> Content:
        bare = [number for number, image in enumerate(images) if self.files.of(image) is None]
        notes = []
        if bare:
            notes.append(
                f"{len(bare)} of {len(images)} images have no label file, first {images[bare[0]]}; they count as "
                "images without an object"
            )
        rows = Rows(self.tree.root, images)
        if self.fill is not None:
            return Content(rows, drawn=self._drawn(images, self.fill, notes), notes=notes)
        return Content(rows, AnnotationTable.of(self._annotations(images)), bare=bare, notes=notes)

    def _lines(self, image: str) -> tuple[list[Line], list[str]]:
        """The objects of an image, and what is wrong with the others."""
        file = self.files.of(image)
        return label_lines(self.tree.path(file), file, self.keypoints) if file else ([], [])

    def _drawn(self, images: Sequence[str], fill: int, notes: list[str]) -> DrawnMasks:
        """The masks of images. Raises InputError with all lines that cannot be read."""
        outlines, ends, problems = Outlines(), [0], list[str]()
        labels, boxes = list[int](), list[list[float]]()
        classes = {own: index + self.shift for index, own in enumerate(self.ids)}
        for image in images:
            lines, wrong = self._lines(image)
            problems += [*wrong, *unknown(lines, classes)]
            for line in lines:
                outlines.add(line.numbers if len(line.numbers) > 4 else None)
                labels.append(classes.get(line.label, 0))
                x0, y0, x1, y1 = line.corners
                boxes.append([x0, y0, x1 - x0, y1 - y0])
            ends.append(len(outlines))
        if problems:
            raise InputError(shortened(problems))
        if without := sum(not outlines.has(place) for place in range(len(outlines))):
            notes.append(f"{without} objects have a box and no outline; their boxes are void in the masks")
        numbers, corners = np.array(labels, np.int64), np.array(boxes, np.float64).reshape(-1, 4)
        order = np.arange(len(outlines))
        return DrawnMasks(outlines, order, np.array(ends), numbers, fill, corners, shares=True)

    def _annotations(self, images: Sequence[str]) -> Iterator[Annotation]:
        classes = {own: index for index, own in enumerate(self.ids)}
        for number, image in enumerate(images):
            lines, problems = self._lines(image)
            # an image without a size does not decode either, which is told then
            size = upright_size(self.tree.path(image)) if lines else None
            yield annotation_of(lines, problems, image, classes, number, size or (1, 1), self.instances)


def _is_other(file: str) -> bool:
    """Whether a text file is known not to hold labels."""
    name = file.rpartition("/")[2].lower()
    return name in NAME_FILES or name.startswith("readme") or name in ("train.txt", "val.txt", "valid.txt", "test.txt")


def _columns(tree: Tree, file: str) -> int:
    """How many numbers the first object in a text file has; 0 if it begins with none."""
    try:
        first = next((line.split() for line in read_lines(tree.path(file)) if line.strip()), [])
        numbers = [float(word) for word in first]
    except (InputError, ValueError, OverflowError):
        return 0
    return len(numbers) if len(numbers) >= 5 and numbers[0] == round(numbers[0]) else 0


def _by_folder(images: Sequence[str], files: LabelFiles) -> dict[str, list[str]]:
    """The images by the name of a split in their path, without those in folders of masks."""
    splits: dict[str, list[str]] = {}
    for image in images:
        if files.of(image) is None and any(same(part) in NOT_IMAGES for part in image.split("/")[:-1]):
            continue
        splits.setdefault(split_of(image.rpartition("/")[0]) or "train", []).append(image)
    return splits


def _described_splits(tree: Tree, said: Description, problems: list[str], notes: list[str]) -> dict[str, list[str]]:
    """The images of each split, as the description lists them."""
    finder, splits = Elsewhere(tree, said.folder), dict[str, list[str]]()
    for key, paths in said.splits.items():
        images: list[str] = []
        for path in paths:
            place = f"{said.file}: {key}"
            whole = f"{said.base}/{path}" if said.base else path
            where = finder.find(whole)
            if where is None and key == "test":  # exports name it, whether they have one or not
                notes.append(f"{place}: {path} is not in {tree.root}: there is no test split")
            elif where is None:
                got = (
                    f"{path!r}, which is not there"
                    if path == whole
                    else f"{path!r} in {said.base!r}, neither is there"
                )
                problems.append(f"{place}: expected a folder or a list of images in {tree.root}, got {got}")
            elif where in tree.files:
                before = f"{where}/" if where else ""
                folders = [one for one in tree.images if one == where or one.startswith(before)]
                found = [join(one, name) for one in folders for name in tree.images[one]]
                images += found
                problems += [] if found else [f"{place}: expected images in {where or tree.root}, got none"]
            else:
                images += _listed_images(tree, where, problems)
        if images:
            splits.setdefault(canonical(key), []).extend(dict.fromkeys(images))
    alike = [name for name in splits if name != "train" and set(splits[name]) <= set(splits.get("train", ()))]
    notes += [
        f"{said.file}: {name} has the images of train: its scores say how well they are remembered, not how well "
        "others are recognised"
        for name in alike
    ]
    return splits


def _listed_images(tree: Tree, file: str, problems: list[str]) -> list[str]:
    """The images that a text file lists."""
    if links := outside(tree.root, [tree.path(file)]):
        problems += links
        return []
    finder, images = Elsewhere(tree, file.rpartition("/")[0]), list[str]()
    for number, line in enumerate(read_lines(tree.path(file)), start=1):
        if not (written := line.strip()):
            continue
        found = finder.find(written)
        if found is None or not is_image(found):
            problems.append(f"{file} line {number}: expected an image in {tree.root}, got {written[:200]!r}")
        else:
            images.append(found)
    return images


def _of_lines(tree: Tree, labelled: Sequence[str], keypoints: int) -> list[str]:
    """The problems of all label files."""
    return [text for file in labelled for text in label_lines(tree.path(file), file, keypoints)[1]]


def _names(tree: Tree, said: Description, labelled: Sequence[str], problems: list[str]) -> tuple[dict[int, str], str]:
    """Class names, and the file that has them; "" if none has."""
    if said.names:
        return said.names, said.file
    folders = sorted({file.rpartition("/")[0] for file in labelled})
    above = [one[:end] for one in folders for end in range(len(one), -1, -1) if one[end : end + 1] in ("", "/")]
    return names_beside(tree, iter(dict.fromkeys([said.folder, *above, ""])), problems)


def _counted(tree: Tree, labelled: Sequence[str], keypoints: int) -> dict[int, str]:
    """Names for the classes that occur in the labels."""
    found = {line.label for file in labelled for line in label_lines(tree.path(file), file, keypoints)[0]}
    return {label: f"class_{label}" for label in range(max(found, default=0) + 1)}
