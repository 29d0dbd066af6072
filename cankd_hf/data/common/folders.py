"""Local image folders: split folders, `metadata.jsonl` or `.csv`, and no path out of the folder.

The layout is that of `datasets`' imagefolder. The metadata is read here and not by `datasets`, which fills the image
columns in the order of the keys (5.2.0): with the mask named first it silently returns the photographs as masks.
"""

import csv
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cankd_hf.data.common.dataset import Known
from cankd_hf.data.common.decode import Decoder, Sample, Unlabelled, missing
from cankd_hf.data.common.files import (
    normal_name,
    outside,
    parse,
    path_problem,
    read_lines,
    relative_to,
    shortened,
    shown,
)
from cankd_hf.data.common.rows import Rows
from cankd_hf.errors import InputError

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
YEAR = re.compile(r"[-_]?(19|20)\d\d$")  # at the end of a split's name, as in `train2017`
IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
MASK_FOLDERS = {"masks", "mask", "labels", "annotations", "gt", "segmentation", "soft"}
METADATA = ("metadata.jsonl", "metadata.csv")
FILE_NAME = "_file_name"  # how the keys of files end in the metadata
MASK_COLUMNS = ["mask", "masks", "label", "labels", "annotation", "annotations", "segmentation", "segmentation_mask"]
EXAMPLE = '{"file_name": "images/a.jpg", "mask_file_name": "masks/a.png"}'


@dataclass(eq=False)
class FolderSource:
    """Samples of a local folder; `decoder` reads its `rows`, of which each needs a mask if they are `masked`."""

    rows: Rows
    decoder: Decoder
    masked: bool = field(default=False, kw_only=True)
    no_mask: str = field(default="the metadata give it no mask", kw_only=True)  # what is said of an image without one
    announced: bool = field(default=False, kw_only=True)  # whether a note of the set tells of images without a label
    called: str = field(default="mask", kw_only=True)  # what an image without one is left out for
    generated = False

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return self.rows.names[index]

    @property
    def unlabelled(self) -> list[int]:
        """Indices of the images without a mask, where they need one."""
        return self.rows.bare() if self.masked else []

    def content(self, index: int) -> Path:
        """The file of an image."""
        return self.rows[index].image

    def alone(self) -> "FolderSource":
        """The images, read without labels."""
        return FolderSource(self.rows, self.decoder)

    def without_labels(self) -> tuple["FolderSource", list[int]]:
        """The images without a label, read without one: a source, and their indices in it and here."""
        return self.alone(), self.rows.bare() if self.masked else []

    def known(self, indices: Sequence[int]) -> Known | None:
        """What is known of these images before any is decoded, if anything."""
        return None

    def absent(self, index: int) -> str:
        """What is wrong with the files of an image by their entries in the folder alone; "" if nothing."""
        row = self.rows[index]
        files = [(row.image, row.name), *([] if row.mask is None else [(row.mask, row.mask_name)])]
        return next((said for path, name in files if (said := missing(path, name))), "")

    def load(self, index: int) -> Sample:
        row = self.rows[index]
        if self.masked and row.mask is None:
            raise Unlabelled(f"{row.name}: {self.no_mask}")
        return self.decoder.pair((row.image, row.name), None if row.mask is None else (row.mask, row.mask_name))


def split_folders(root: Path) -> dict[str, Path]:
    """Canonical split name -> folder; a folder without split folders is one `train` split. Beside these a folder of
    any other name that has metadata of its own is a split too. Raises InputError if two folders are the same split."""
    found: dict[str, Path] = {}
    try:
        folders = sorted(path for path in root.iterdir() if os.path.isdir(path))
    except OSError as error:
        raise InputError(f"data.path: expected a folder that can be read, got {root}: {error.strerror}") from None
    for folder in folders:
        split = SPLIT_NAMES.get(folder.name.lower())
        if split is None:
            continue
        if split in found:
            raise InputError(f"{root}: expected one folder for {split}, got {found[split].name} and {folder.name}")
        found[split] = folder
    if not found:
        return {"train": root}
    others = [folder for folder in folders if folder not in found.values()]
    return found | {folder.name: folder for folder in others if any((folder / name).is_file() for name in METADATA)}


def usual_split(name: str) -> str:
    """The usual name of a split: `val`, `dev` and `val2017` are `validation`; another name is kept."""
    return SPLIT_NAMES.get(YEAR.sub("", name.lower()), name)


def described(root: Path) -> bool:
    """Whether a folder, or one of its split folders, has a metadata file that says what belongs to what."""
    folders = [root, *split_folders(root).values()]
    return any(_metadata_file(root, folder)[0] is not None for folder in folders)


def read_split(
    root: Path, folder: Path, image_column: str, mask_column: str | None, keep: Sequence[str] = ()
) -> tuple[Rows, list[dict[str, Any]], list[str]]:
    """Read the rows of the split in `folder`; returns them, their values, and warnings.

    `image_column` is `auto` or `image` for the key `file_name`, another name X for the key `X_file_name`; the same
    goes for `mask_column`, None without masks. `keep` names the other keys whose values are returned, where a line has
    them; those of a key like `X_file_name` as names in the data folder. Raises InputError listing every line that
    cannot be used; no path may leave the data folder `root`.
    """
    metadata, base = _metadata_file(root, folder)
    if metadata is None:
        files = _image_files(root, folder)
        if mask_column is not None and files:
            raise InputError(
                f"{folder}: expected metadata.jsonl with a line for each image, like {EXAMPLE}, got none; "
                "without it the mask of each image is unknown"
            )
        if problems := outside(root, (os.path.join(root, name) for name in files)):
            raise InputError(shortened(problems))
        return Rows(root, files), [{} for _ in files], []
    if problems := outside(root, [metadata]):
        raise InputError(problems)
    lines, problems = _read_lines(metadata)
    if base == root and folder != root:
        lines = [line for line in lines if str(line[1].get("file_name", "")).split("/")[0] == folder.name]
    problems += _type_changes(metadata, lines)
    image_key, mask_key = "file_name", None
    if image_column not in ("auto", "image", "file_name"):
        image_key = _key_of(image_column, lines)
    if mask_column is not None and lines:
        try:
            mask_key = _mask_key(metadata, mask_column, lines)
        except InputError as error:
            raise InputError(shortened([*problems, *error.problems])) from None
    names, masks, others, values = list[str](), list[str](), list[str](), list[dict[str, Any]]()
    before = f"{relative_to(base, root)}/".removeprefix("./")
    for number, line in lines:
        place = f"{relative_to(metadata, root)} line {number}"
        # null, or an empty cell of a csv file: an image without a mask
        bare = mask_key is None or (mask_key in line and line[mask_key] in (None, ""))
        beside = [key for key in keep if key.endswith(FILE_NAME) and line.get(key)]
        wrong = [path_problem(place, key, line) for key in [image_key, *([] if bare else [mask_key]), *beside] if key]
        if any(wrong):
            problems += [problem for problem in wrong if problem]
            continue
        names.append(before + normal_name(line[image_key]))
        masks.append("" if bare or mask_key is None else before + normal_name(line[mask_key]))
        values.append({key: line[key] for key in keep if key in line})
        values[-1] |= {key: before + normal_name(line[key]) for key in beside}
        others += [values[-1][key] for key in beside]
    problems += outside(root, (os.path.join(root, name) for name in [*names, *filter(None, masks), *others]))
    if problems:
        raise InputError(shortened(problems))
    return Rows(root, names, masks), values, _notices(root, folder, metadata, names, masks, others)


_PART = r"\[(\d{,18})(%?):(\d{,18})(%?)(?::(\d{1,9}))?(?:@(\d{1,9}))?\]"
_PARTS = f"(?:{re.sub(r'[(](?![?])', '(?:', _PART)})*"  # any number of them, without groups


def slice_of(text: str, size: int) -> tuple[str, Sequence[int]]:
    """Parse `train[:90%]` into the name of the split and the indices of its samples. Raises InputError if it is
    invalid. `train[::8]` takes each eighth; `train[:90%@7]` takes them from an order shuffled by the seed 7: with
    `train[90%:@7]` two random parts. A part of a part is written as `train[::8][:80%@0]`, further samples as
    `train[:50]+train[80:]`, and samples that are left out as `train[::8]-train[:62]`."""
    name, terms = split_terms(text)
    taken = _parts_of(terms[0][1], size)
    for sign, brackets in terms[1:]:
        other = _parts_of(brackets, size)
        if sign == "+":
            taken = [*taken, *sorted({*other} - {*taken})]
        else:
            left_out = {*other}
            taken = [index for index in taken if index not in left_out]
    return name, taken


def split_terms(text: str) -> tuple[str, list[tuple[str, str]]]:
    """The name of a split, and each of its terms: + or -, and the brackets. Raises InputError as `slice_of` does."""
    match = re.fullmatch(rf"(?P<name>[^\[\]]+?)({_PARTS})((?: *[+-] *(?P=name){_PARTS})*)", text.strip())
    if match is None:
        raise InputError(f"data: expected a split like `train`, `train[:90%]` or `train[::8]`, got {shown(text)}")
    further = re.findall(rf"([+-]) *{re.escape(match['name'])}({_PARTS})", match[3])
    return match["name"], [("+", match[2]), *further]


def _parts_of(brackets: str, size: int) -> Sequence[int]:
    """The indices that a row of brackets takes, each from those of the one before."""
    taken: Sequence[int] = range(size)
    for part in re.finditer(_PART, brackets):
        taken = _part_of(taken, *part.groups())
    return taken


def _part_of(
    taken: Sequence[int],
    first: str,
    first_percent: str,
    last: str,
    last_percent: str,
    step: str | None,
    seed: str | None,
) -> Sequence[int]:
    """A part of the indices of samples; the arguments are those of one pair of brackets."""
    size = len(taken)

    def place(value: str, percent: str, default: int) -> int:
        if not value:
            return default
        return min(size, round(int(value) * size / 100) if percent else int(value))

    if step is not None and not int(step):
        raise InputError("data: expected a step of at least 1 in a split like `train[::8]`, got 0")
    part = slice(place(first, first_percent, 0), place(last, last_percent, size), int(step or 1))
    if seed is None:
        return taken[part]
    return sorted(taken[index] for index in np.random.default_rng(int(seed)).permutation(size)[part])


def _metadata_file(root: Path, folder: Path) -> tuple[Path | None, Path]:
    """The metadata file of a split, if any, and the folder that its paths are relative to."""
    for base in dict.fromkeys([folder, root]):
        for name in METADATA:
            if os.path.lexists(base / name):
                return base / name, base
    return None, folder


def metadata_keys(root: Path, folder: Path) -> list[str]:
    """The keys in the metadata of a split; none without metadata. Raises InputError for lines that are none."""
    metadata, _ = _metadata_file(root, folder)
    if metadata is None or outside(root, [metadata]):  # told where it is read
        return []
    lines, problems = _read_lines(metadata)
    if problems:
        raise InputError(shortened(problems))
    return list(dict.fromkeys(key for _, line in lines for key in line))


def _read_lines(metadata: Path) -> tuple[list[tuple[int, dict[str, Any]]], list[str]]:
    """Line number and content of each entry, and the problems of lines that are none."""
    entries, problems = list[tuple[int, dict[str, Any]]](), list[str]()
    lines = read_lines(metadata)
    if metadata.suffix == ".csv":
        try:
            for number, entry in enumerate(csv.DictReader(lines), start=2):
                if None in entry:
                    problems.append(f"{metadata} line {number}: expected as many values as columns, got more")
                else:
                    entries.append((number, entry))
        except csv.Error as error:
            raise InputError(f"{metadata}: expected a csv file, got one that does not parse: {error}") from None
        return entries, problems
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = parse(line.strip(), f"{metadata} line {number}:")
        except InputError as error:
            problems += error.problems
            continue
        if isinstance(entry, dict):
            entries.append((number, entry))
        else:
            problems.append(f"{metadata} line {number}: expected an object like {EXAMPLE}, got {line.strip()[:60]}")
    return entries, problems


def _type_changes(metadata: Path, lines: list[tuple[int, dict[str, Any]]]) -> list[str]:
    """Columns with numbers in one line and text in another: a sign of a broken export."""
    first: dict[str, tuple[int, str]] = {}
    problems: dict[str, str] = {}
    for number, line in lines:
        for key, value in line.items():
            kind = "number" if isinstance(value, (int, float)) else type(value).__name__.replace("str", "text")
            if value is None or first.setdefault(key, (number, kind))[1] == kind:
                continue
            problems.setdefault(
                key,
                f"{metadata} line {number}: expected column {key!r} to hold a {first[key][1]} as in line "
                f"{first[key][0]}, got a {kind}: {shown(value)}; write one type, or drop the column",
            )
    return list(problems.values())


def _key_of(column: str, lines: list[tuple[int, dict[str, Any]]]) -> str:
    """The metadata key of a column: its name, or its name and `_file_name`."""
    keys = {key for _, line in lines for key in line}
    return column if column in keys else f"{column}_file_name"


def _mask_key(metadata: Path, column: str, lines: list[tuple[int, dict[str, Any]]]) -> str:
    """The metadata key of the mask."""
    keys = list(dict.fromkeys(key for _, line in lines for key in line))
    if column != "auto":
        key = _key_of(column, lines)
        if key in keys:
            return key
    else:
        named = [f"{name}_file_name" for name in MASK_COLUMNS if f"{name}_file_name" in keys]
        others = [key for key in keys if key.endswith("_file_name")]
        if named or len(others) == 1:
            return (named or others)[0]
    wanted = "a key `mask_file_name`" if column == "auto" else f"a key `{_key_of(column, lines)}`"
    raise InputError(
        f"{metadata}: expected {wanted} with the mask of each image, got the keys {shown(keys)}; see {EXAMPLE}"
    )


def _notices(
    root: Path, folder: Path, metadata: Path, names: list[str], masks: list[str], beside: list[str]
) -> list[str]:
    """Warnings about files listed twice and files not listed."""
    warnings = []
    for name, count in Counter(names).items() if len({*names}) < len(names) else ():
        if count > 1:
            listed = [mask for other, mask in zip(names, masks, strict=True) if other == name]
            others = f" with the masks {', '.join(listed)}" if len(set(listed)) > 1 else ""
            warnings.append(f"{relative_to(metadata, root)}: {name} is listed {count} times{others}")
    known = {*names, *masks, *beside}
    # without labels, unlisted masks do not matter
    unlisted = [name for name in _image_files(root, folder, masks=any(masks)) if name not in known]
    if unlisted:
        where = "" if folder == root else f"{relative_to(folder, root)}: "
        warnings.append(
            f"{where}{len(unlisted)} images are not listed in {metadata.name} and not used, first {unlisted[0]}"
        )
    return warnings


def _image_files(root: Path, folder: Path, masks: bool = False) -> list[str]:
    """Image files below a folder by their names in `root`, sorted, without hidden ones; those in mask folders only
    with `masks`."""
    found: list[list[str]] = []
    for where, folders, files in os.walk(folder):
        folders[:] = [
            name for name in folders if not name.startswith(".") and (masks or name.lower() not in MASK_FOLDERS)
        ]
        parts = os.path.relpath(where, root).split(os.sep) if Path(where) != root else []
        found += [
            [*parts, name]
            for name in [*files, *folders]  # a folder of such a name is told of when it is read
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_ENDINGS
        ]
    return ["/".join(parts) for parts in sorted(found)]
