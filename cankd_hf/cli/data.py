"""`python -m cankd_hf.data FOLDER`: what a data set is, with pictures, what is wrong with it, and what comes next."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cankd_hf.commands import check_file, command_parser, console, exit_code, importing
from cankd_hf.config.named import check_named
from cankd_hf.errors import InputError
from cankd_hf.json_text import to_json

if TYPE_CHECKING:
    from cankd_hf.cli.looking import Seen

EXAMPLES = """examples:
  python -m cankd_hf.data /data/mine
  python -m cankd_hf.data /data/mine --task detection --output looked_at.png
  python -m cankd_hf.data /data/large --limit 2000
  python -m cankd_hf.data /data/mine --json > mine.json

It reads a sample of large sets and says so; nothing is written but the picture. docs/data.md shows the layouts that
are found, docs/plan.md what comes next.

exit codes: 0 done, whatever problems it tells, 2 there is no data set"""
LIMIT = 500
WIDTH = 80
MOST_CLASSES = 40
SMALL = 512  # pixels of the longest side: larger recipes are for large GPUs


def parser() -> argparse.ArgumentParser:
    """The command line, without importing anything heavy."""
    made = command_parser("data", "Look at a data set before training on it.", EXAMPLES)
    made.add_argument("path", metavar="FOLDER", help="a folder, parquet file or Hub data set, as for data.path")
    tasks = "segmentation, detection, instance-segmentation, depth, classification or features"
    made.add_argument("--task", help=f"whose labels to look at, where there are several: {tasks}")
    made.add_argument(
        "--limit", type=int, default=LIMIT, metavar="N", help=f"images of each split to decode (default: {LIMIT})"
    )
    made.add_argument(
        "--output",
        metavar="PNG",
        help="file for the pictures (default: NAME_data.png in this folder, or beside FOLDER if it is in it)",
    )
    made.add_argument("--json", action="store_true", help="print it as JSON")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns the exit code."""
    made = parser()
    options = made.parse_args(argv)
    if options.limit < 1:
        made.error(f"--limit: expected at least 1, got {options.limit}")
    if options.output and Path(options.output).suffix.lower() != ".png":
        made.error(f"--output: expected the name of a .png file, got {options.output}")
    return exit_code(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    if options.path != "shapes":
        check_named("data.path", options.path, "a folder, a parquet file or a Hub data set", cached=True)
    with importing():
        from cankd_hf.cli.looking import kind_of, look_at
        from cankd_hf.figures.samples import draw_samples
        from cankd_hf.training.checkpoint_files import writing
    file = Path(options.output or beside(options.path, f"{name_of(options.path)}_data.png"))
    check_file(options.output, "--output")
    seen = look_at(options.path, kind_of(options.task), options.limit)
    unwritten: list[str] = []
    if seen.pictures:
        try:
            with writing(file):
                draw_samples(file, heading(seen), seen.pictures, seen.overview)
        except InputError as error:  # told after what was found, which needs no file
            unwritten = error.problems
    _tell(options, seen, None if unwritten or not seen.pictures else file)
    if unwritten:
        raise InputError(unwritten)
    return 0


def _tell(options: argparse.Namespace, seen: Seen, file: Path | None) -> None:
    """Prints what was found, and where the pictures of it are."""
    if options.json:
        sys.stdout.write(to_json(as_dict(seen, file)) + "\n")
        return
    print_seen(seen)
    print(f"pictures: {file or 'none' if seen.pictures else 'none, as no image could be read'}")
    alone = "" if seen.whole is None else " that learns from these images alone"
    print(f"\nThe section for a recipe{alone}:\n\n{section_text(seen)}")
    for line in next_steps(seen):
        print(line)


def name_of(path: str) -> str:
    """The name of a data set, for files and folders."""
    return re.sub(r"[^\w.-]+", "_", Path(path).resolve().name if Path(path).exists() else path).strip("._") or "data"


def beside(path: str, name: str) -> Path:
    """A file in the current folder, or where that is in the data set, of which it would be an image, beside that."""
    root = Path(path).resolve()
    return root.parent / name if root.is_dir() and Path.cwd().is_relative_to(root) else Path(name)


def heading(seen: Seen) -> str:
    """Above the pictures: what the set is, and its splits."""
    splits = ", ".join(f"{name} {size:,}" for name, size in seen.sizes.items())
    return f"{name_of(seen.path)}: {seen.layout}; {splits}"


def print_seen(seen: Seen) -> None:
    """Prints what was found, and what is wrong with it."""
    from cankd_hf.cli.looking import shape_lines
    from cankd_hf.tasks import TASKS

    out = console(WIDTH)
    others = [name for name, task in TASKS.items() if task.label_kind in {*seen.kinds} - {seen.kind, "images"}]
    also = f" (also for {', '.join(others)}: --task {others[0]})" if others else ""
    out.print(f"{seen.path}: {seen.layout}, for {seen.task.name}{also}", style="bold", highlight=False, soft_wrap=True)
    for line in overview_lines(seen):
        print(line)
    for number, line in enumerate(shape_lines(seen)):
        print(wrapped("images:" if number == 0 else "", line))
    for note in seen.notes:
        said, brace, paste = note.partition(": {")
        print(wrapped("note:", said + (":" if brace else "")))
        if brace:  # a line to paste stays one
            print("{" + paste)
    if seen.overview.unit:
        first = f" (the first {MOST_CLASSES})" if len(seen.overview.classes) > MOST_CLASSES else ""
        print(f"{len(seen.overview.classes)} classes{first}, share of {seen.overview.unit} (images that hold it)")
        out.print(_class_table(seen))
    if seen.problems:
        print("problems:")
        for problem in seen.problems:
            print(wrapped("  -", problem))
    elif not seen.sampled:
        print("problems: none found")
    else:
        print("problems: none found in what was read")


def wrapped(head: str, text: str) -> str:
    """A line with its head, in 80 columns."""
    width = 8 if len(head) > 3 or not head else 3
    filled = textwrap.wrap(text, WIDTH - width - 1, break_long_words=False, break_on_hyphens=False) or [""]
    return "\n".join([f"{head:<{width}} {filled[0]}", *(" " * (width + 1) + line for line in filled[1:])])


def overview_lines(seen: Seen) -> Iterator[str]:
    """Splits with their sizes, and how many of them were read."""
    splits = ", ".join(f"{name} {size:,}" for name, size in seen.sizes.items())
    yield wrapped("splits:", splits + (" images" if seen.sizes else ""))
    if seen.sampled:
        read = ", ".join(f"{seen.read.get(name, 0):,} of {name}" for name in seen.sizes)
        counted = "" if not seen.overview.unit else "; shares below are of these"
        whole = [name for name in seen.sizes if name in seen.overview.whole]
        if whole and len(whole) == len(seen.sizes):
            counted = f"; {seen.overview.unit} are counted in all images"
        yield wrapped("sample:", f"decoded {read}, spread evenly (--limit){counted}")


def _class_table(seen: Seen) -> Any:
    """Classes with their shares in each split."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from cankd_hf.tasks.overview import class_table

    overview = seen.overview
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    rows = class_table(overview, MOST_CLASSES)
    table.add_column("class", overflow="ellipsis", max_width=28, no_wrap=True)
    splits = [name for name in seen.sizes if name in overview.counts][:4]
    for name in splits:
        table.add_column(name[:14], justify="right", no_wrap=True)
    for name, by_split in rows:
        cells = [by_split[split] for split in splits]
        table.add_row(name, *(f"{share:.1%} ({images:,})" if images else "-" for share, images in cells))
    totals = [f"{overview.counts[split].total():,}" for split in splits]
    table.add_section()
    table.add_row(f"all {overview.unit}", *totals)
    return table


def section_text(seen: Seen) -> str:
    """The `data:` section as YAML."""
    from cankd_hf.config.plain_yaml import dump_yaml

    return readable(dump_yaml({"data": seen.settings}))


def readable(text: str) -> str:
    """YAML with its letters as they are written, not as their codes."""

    def letter(found: re.Match[str]) -> str:
        one = chr(int(found[1] or found[2], 16))
        return one if one.isprintable() and one not in '"\\' else found[0]

    return re.sub(r"\\(?:x([0-9A-F]{2})|u([0-9A-F]{4}))", letter, text)


def next_steps(seen: Seen) -> list[str]:
    """Commands that train on this set: `cankd init`, and the shipped recipes that fit it; of a part of a set that look
    at the whole."""
    if seen.whole is not None:
        return [
            "What to do next:",
            f"  cankd data {shlex.quote(seen.whole)}",
            f"  cankd data {shlex.quote(seen.path)} --task features   # to learn from these images alone",
        ]
    found = (f"  cankd train {recipe}" for recipe in fitting_recipes(seen))
    named = f" --task {seen.task.name}" if seen.asked_for else ""
    return ["What to do next:", f"  cankd init --data {shlex.quote(seen.path)}{named}", *found]


def fitting_recipes(seen: Seen) -> list[str]:
    """Shipped recipes for the set's task, each with its overrides: those that distil from a published teacher, and a
    teacher with the student that learns from it, which is the smallest pair with pretrained weights."""
    read = _recipes_of(seen.task.name)
    alone = [name for name, recipe in read.items() if "dinov2" in name and not _of_a_run(recipe) and recipe["teacher"]]
    pairs = [
        (name, other)
        for name, recipe in read.items()
        for other, teacher in read.items()
        if _of_a_run(recipe) and recipe["teacher"]["model"] == teacher["output_dir"] and not teacher.get("teacher")
        if all("pretrained" in str(one["student"].get("backbone")) for one in (recipe, teacher))
    ]
    small = [pair for pair in pairs if max(read[pair[0]]["data"].get("image_size") or [SMALL + 1]) <= SMALL]
    both = min(small, default=None)
    size = seen.settings.get("image_size")
    lines = [f"{name} {_overrides(seen, read[name])}" for name in alone]
    if both is not None and size is not None:
        fitted = shlex.join([f"data.{key}=[{size[0]},{size[1]}]" for key in ("image_size", "crop_size")])
        lines += [f"{name} {_overrides(seen, read[name])} {fitted}" for name in reversed(both)]
    return lines


def _recipes_of(task: str) -> dict[str, dict[str, Any]]:
    """Shipped recipes of a task that read any data set, by name."""
    from cankd_hf.config.plain_yaml import parse_yaml
    from cankd_hf.config.reading import read_text
    from cankd_hf.config.shipped import shipped_files

    read = {file.stem: parse_yaml(read_text(file, "recipe"), file.name)[0] for file in shipped_files("recipe")}
    return {
        name: {"teacher": {}, "student": {}, **recipe}
        for name, recipe in read.items()
        if recipe["task"] == task and recipe["data"]["path"] == "???"
    }


def _of_a_run(recipe: dict[str, Any]) -> bool:
    """Whether the teacher is what another recipe has trained."""
    return str((recipe["teacher"] or {}).get("model", "")).startswith("runs/")


def _overrides(seen: Seen, recipe: dict[str, Any]) -> str:
    """What a recipe needs to read this set: its path, and the splits that are others."""
    from cankd_hf.config.data import DataConfig

    default, data = DataConfig(), recipe["data"]
    splits = ("train_split", "eval_split", "test_split")
    wanted = {key: seen.settings.get(key, getattr(default, key)) for key in splits}
    changed = {key: value for key, value in wanted.items() if value != data.get(key, getattr(default, key))}
    said = [f"data.path={seen.path}", *(f"data.{key}={'null' if v is None else v}" for key, v in changed.items())]
    return shlex.join(said)


def as_dict(seen: Seen, file: Path | None) -> dict[str, Any]:
    """All of it as plain data."""
    from cankd_hf.tasks.overview import class_table

    shapes = sorted(seen.shapes, key=lambda shape: shape[0] * shape[1])
    return {
        "path": seen.path,
        "layout": seen.layout,
        "labels": seen.kind,
        "kinds": list(seen.kinds),
        "task": seen.task.name,
        "splits": {name: {"images": size, "read": seen.read.get(name, 0)} for name, size in seen.sizes.items()},
        "sampled": seen.sampled,
        "classes": [
            {"name": name, "shares": {split: round(share, 6) for split, (share, _) in by_split.items()}}
            | {"images": {split: images for split, (_, images) in by_split.items()}}
            for name, by_split in class_table(seen.overview, 10**6)
        ],
        "unit": seen.overview.unit,
        "counts": {split: counts.total() for split, counts in seen.overview.counts.items()},
        "sizes": {"least": shapes[0], "median": shapes[len(shapes) // 2], "most": shapes[-1]} if shapes else {},
        "formats": dict(seen.modes),
        "rotated": seen.rotated,
        "notes": seen.notes,
        "problems": seen.problems,
        "pictures": None if file is None else str(file),
        "data": seen.settings,
        "recipes": fitting_recipes(seen),
        "part_of": seen.whole,
    }
