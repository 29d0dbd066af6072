"""Pascal VOC boxes: an xml file for each image, in `Annotations/` for `JPEGImages/`, or beside it."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from cankd_hf.data.common.files import outside, read_lines, shortened
from cankd_hf.data.common.labels import Labels
from cankd_hf.data.common.rows import Rows
from cankd_hf.data.detection.objects import Annotation, read_annotation
from cankd_hf.data.detection.table import AnnotationTable
from cankd_hf.data.layouts.base import Content, Found, Split, Tree, canonical, ordered
from cankd_hf.data.layouts.elsewhere import NOT_IMAGES, ByName, join, same, split_of, stem
from cankd_hf.data.layouts.voc_xml import VocFile, is_voc, read_xml
from cankd_hf.errors import InputError

LOOKED_AT = 20  # xml files, of which one of annotations says that they are
LISTS = ("train", "val", "trainval", "test")


@dataclass
class _Pairs:
    """The xml files of a set, by their images."""

    xml_of: dict[str, str] = field(default_factory=dict)  # image -> xml
    alone: list[str] = field(default_factory=list)  # xml files without an image
    files: dict[str, VocFile] = field(default_factory=dict)  # xml -> what it says
    problems: dict[str, list[str]] = field(default_factory=dict)  # xml -> why it cannot be read


class VocBoxes:
    """The layout of Pascal VOC, LabelImg, Roboflow and CVAT."""

    name = "Pascal VOC boxes"

    def find(self, tree: Tree, need: str | None) -> Found | None:
        if need == "masks":
            return None
        xmls = [join(folder, name) for folder, names in tree.files.items() for name in names if _is_xml(name)]
        if not any(is_voc(tree.path(name)) for name in xmls[:: max(1, len(xmls) // LOOKED_AT)]):
            return None
        if problems := tree.refuse_links(xmls):
            raise InputError(shortened(problems))
        pairs = _paired(tree, xmls)
        notes: list[str] = []
        splits = _listed_splits(tree, problems, notes) or _by_folder(tree, pairs)
        problems += tree.refuse_links([image for part in splits.values() for image in part])
        if not pairs.xml_of:
            problems.append(
                f"{tree.root}: expected the images of {len(xmls)} xml files, such as `JPEGImages/{stem(xmls[0])}.jpg` "
                f"for {xmls[0]}, got none"
            )
        if problems:  # with what reading the splits would tell
            problems += [text for found in pairs.problems.values() for text in found]
            problems += [text for file in pairs.files.values() for text in file.problems]
            raise InputError(shortened(problems))
        if pairs.alone:
            notes.append(f"{len(pairs.alone)} xml files belong to no image and are not used, first {pairs.alone[0]}")
        names = Counter(entry.name for file in pairs.files.values() for entry in file.objects)
        classes = {name: index for index, name in enumerate(sorted(names, key=lambda name: (same(name), name)))}
        notes += _like(names)
        first = 0 if any(min(one.corners[:2]) < 1 for file in pairs.files.values() for one in file.objects) else 1
        if not first:
            notes.append("coordinates in the xml files begin at 0, as some have it; they are taken as they are")
        read = partial(_content, tree, pairs, classes, first)
        found = {name: Split(len(part), partial(read, part)) for name, part in splits.items()}
        labels = Labels(dict(enumerate(classes)))
        return Found(self.name, ("boxes", "images"), tree.root, ordered(found), labels, notes, "the xml files")


def _content(tree: Tree, pairs: _Pairs, classes: Mapping[str, int], first: int, images: Sequence[str]) -> Content:
    """The images of a split with their objects, whose pixels are counted from `first`."""
    bare = [number for number, image in enumerate(images) if image not in pairs.xml_of]
    notes = []
    if bare:
        notes.append(
            f"{len(bare)} of {len(images)} images have no xml file, first {images[bare[0]]}; they count as images "
            "without a box"
        )
    return Content(
        Rows(tree.root, images),
        AnnotationTable.of(_annotations(pairs, classes, first, images)),
        bare=bare,
        notes=notes,
    )


def _annotations(pairs: _Pairs, classes: Mapping[str, int], first: int, images: Sequence[str]) -> Iterator[Annotation]:
    for number, image in enumerate(images):
        xml = pairs.xml_of.get(image, "")
        file = pairs.files.get(xml, VocFile("", None, []))
        boxes = [[one.corners[0] - first, one.corners[1] - first, *one.corners[2:]] for one in file.objects]
        objects = {
            "bbox": boxes,
            "category": [one.name for one in file.objects],
            # left out of losses and scores, as VOC's own evaluation leaves them out
            "iscrowd": [int(one.difficult) for one in file.objects],
        }
        read = read_annotation(objects, xml or image, classes, "xyxy", number, file.size)
        faults = [*pairs.problems.get(xml, ()), *file.problems]
        yield replace(read, faults=(*faults, *read.faults)) if faults else read


def _paired(tree: Tree, xmls: Sequence[str]) -> _Pairs:
    """Reads the xml files, and finds the image of each: that of its stem, else that of the name in it."""
    images = ByName(tree, stem)
    found = _Pairs()
    for xml in xmls:
        written = ""
        try:
            found.files[xml] = read_xml(tree.path(xml), xml)
            written = found.files[xml].file_name
        except InputError as error:
            found.problems[xml] = error.problems
        folder = xml.rpartition("/")[0]
        named = (images.find(name, folder, split_of(folder)) for name in (xml, written) if name)
        if (image := next(filter(None, named), None)) is None:
            found.alone.append(xml)
            continue
        found.xml_of[image] = xml
    return found


def _listed_splits(tree: Tree, problems: list[str], notes: list[str]) -> dict[str, list[str]]:
    """The images of each list in `ImageSets/Main`."""
    splits: dict[str, list[str]] = {}
    for folder in tree.files:
        if not same(f"/{folder}").endswith(("/imagesets/main", "/imagesets")):
            continue
        above = folder[: same(f"/{folder}").rindex("/imagesets")].strip("/")
        images = {
            stem(name): join(one, name)
            for one, names in sorted(tree.images.items(), key=lambda pair: _is_mask_folder(pair[0]), reverse=True)
            if not above or one == above or one.startswith(f"{above}/")
            for name in names
        }
        for name in LISTS:
            if not (file := tree.find(f"{name}.txt", folder=folder)):
                continue
            if links := outside(tree.root, [tree.path(file)]):
                problems += links
                continue
            lines = [(number, line.strip()) for number, line in enumerate(read_lines(tree.path(file)), 1)]
            found = {number: _image_of(images, text) for number, text in lines if text}
            missing = [(number, text) for number, text in lines if text and found[number] is None]
            if missing and len(missing) == len(found):
                notes.append(f"{file}: none of its {len(found)} images is here: there is no {canonical(name)} split")
                continue
            problems += [
                f"{file} line {number}: expected an image of this name, got {text!r}" for number, text in missing
            ]
            part = [image for image in found.values() if image is not None]
            splits.setdefault(canonical(name), []).extend(dict.fromkeys(part))
    if "trainval" in splits and "train" not in splits:
        splits["train"] = splits.pop("trainval")
        notes.append("ImageSets has trainval.txt and no train.txt: trainval is the train split")
    return splits


def _image_of(images: Mapping[str, str], text: str) -> str | None:
    """The image that a line of a list names, which may be followed by a number."""
    words = [text, text.rpartition(" ")[0].strip()]
    # a name may hold points, so that its stem is looked for too
    return next((images[key] for word in words for key in (same(word), stem(word)) if key in images), None)


def _by_folder(tree: Tree, pairs: _Pairs) -> dict[str, list[str]]:
    """The images in the folders of those with an xml file, by the name of a split in their path."""
    splits: dict[str, list[str]] = {}
    for folder in dict.fromkeys(image.rpartition("/")[0] for image in sorted(pairs.xml_of)):
        splits.setdefault(split_of(folder) or "train", []).extend(join(folder, name) for name in tree.images[folder])
    return splits


def _like(names: Counter[str]) -> list[str]:
    """A note for each group of class names that differ in case alone."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(same(name), []).append(name)
    return [
        "classes " + " and ".join(f"{name!r} ({names[name]} boxes)" for name in group) + " differ in case alone and "
        "count as different ones"
        for group in groups.values()
        if len(group) > 1
    ]


def _is_mask_folder(folder: str) -> bool:
    return any(same(part) in NOT_IMAGES for part in folder.split("/"))


def _is_xml(name: str) -> bool:
    return name.lower().endswith(".xml")
