"""The output folder of a run, and protection of earlier runs in it."""

import json
import logging
import os
from collections.abc import Collection, Sequence
from itertools import count
from pathlib import Path

import torch

from cankd_hf.config.recipe import Recipe, recipe_differences, recipe_to_yaml
from cankd_hf.data.common.sources import TaskData
from cankd_hf.errors import InputError
from cankd_hf.hub.files import read_json
from cankd_hf.json_text import to_json
from cankd_hf.names import ARM_FILE, DATA_FILE, RECIPE_FILE, RUN_FILES, THREADS_FILE
from cankd_hf.runs.record import write_json, write_text
from cankd_hf.training.arguments import CanKDConfig
from cankd_hf.training.checkpoint_files import ASIDE, LIST_FILE, writing

logger = logging.getLogger(__name__)


def claim(out: Path, recipe: Recipe, args: CanKDConfig) -> None:
    """Writes the recipe into the output folder; InputError if that holds a run of another one, which is kept."""
    with args.main_process_first(local=False, desc="claiming the output folder"):
        check_recipe_of(out, recipe)
        if args.process_index == 0:
            write_text(out / RECIPE_FILE, recipe_to_yaml(recipe))
            _claim_threads(out)


def _claim_threads(out: Path) -> None:
    """Records the number of threads that a run begins with; warns where it goes on with another one."""
    now = torch.get_num_threads()
    then = threads_of(out) or now
    if then != now:
        logger.warning(
            "threads: %s now, the run in %s began with %s: its numbers differ in their last bits from those of an "
            "uninterrupted one; OMP_NUM_THREADS=%s or torch.set_num_threads(%s) keeps them",
            *(now, out, then, then, then),
        )
    write_json(out / THREADS_FILE, {"threads": then})


def threads_of(out: Path) -> int | None:
    """The number of threads that the run in a folder began with; None where there is no work or no such number."""
    found = read_json(out / THREADS_FILE).get("threads") if holds_work(out) else None
    return found if type(found) is int and found > 0 else None


def check_recipe_of(out: Path, recipe: Recipe) -> None:
    """Raises InputError if the folder holds a run of another recipe."""
    file = out / RECIPE_FILE
    if not file.is_file() or not holds_work(out):
        return
    differences = recipe_differences(file.read_text(encoding="utf-8", errors="replace"), recipe)
    if differences:
        raise InputError(
            f"output_dir {out}: holds a run of another recipe ({'; '.join(differences[:5])}); choose another "
            "output_dir, or start over in this one with --restart, which moves the old one aside"
        )


def claim_data(out: Path, recipe: Recipe, data: TaskData, args: CanKDConfig) -> None:
    """Records files, sizes and class names of the data set; InputError if a run here began with other ones."""
    file = out / DATA_FILE
    with args.main_process_first(local=False, desc="comparing the data set"):
        if args.process_index:
            return
        now = json.loads(to_json(_data_record(recipe, data)))
        then = read_json(file) if file.is_file() and holds_work(out) else now
        differences = _differences(then, now)
        if differences:
            raise InputError(
                f"data.path {recipe.data.path}: differs from the set that the run in {out} began with "
                f"({'; '.join(differences[:5])}{'; ...' if len(differences) > 5 else ''}); restore it, choose another "
                "output_dir, or start over with --restart, which moves the old run aside"
            )
        write_json(file, now)


def holds_work(out: Path) -> bool:
    """Whether a folder contains a checkpoint or a finished arm, itself or in a subfolder, of a phase too."""
    written = f"{ASIDE}/checkpoint-*/{LIST_FILE}"  # to its end, but killed before it was in place
    patterns = ("checkpoint-*", ARM_FILE, written)
    for pattern in patterns:
        found = (place for depth in ("", "*/", "*/*/") for place in out.glob(depth + pattern))
        if any(pattern == written or ASIDE not in place.parts for place in found):
            return True
    return False


def set_aside(out: Path) -> None:
    """Renames the folder of an earlier run, so that the new run does not resume from its checkpoints."""
    if not holds_work(out):
        return
    place = out.resolve()  # of a link, the folder it points to: renaming the link would leave the run where it is
    if place == Path.cwd().resolve():
        raise InputError(f"output_dir {out}: cannot be moved aside, it is the current folder; name another one")
    number = next(n for n in count(1) if not place.with_name(f"{place.name}.before{n}").exists())
    target = place.with_name(f"{place.name}.before{number}")
    try:
        place.rename(target)
    except OSError as error:
        raise InputError(
            f"output_dir {out}: {place} cannot be renamed to {target.name}: {error.strerror}; choose another "
            "output_dir"
        ) from error
    with writing(place):
        place.mkdir()
    logger.warning("starting over: what was in %s is now in %s", out, target)


def expect_change(out: Path, problems: Sequence[str]) -> None:
    """Notes that the files of the data set in which these problems are will be mended before the run goes on.

    Of several processes, the one that has read the file notes it.
    """
    record = read_json(out / DATA_FILE)
    files = record.get("files") or {}
    for name in files:
        if any(problem.startswith((f"{name}:", f"{name} ")) for problem in problems):
            files[name] = None
    if files:
        write_json(out / DATA_FILE, record)


COMPARED = ("classes", "splits", "unlabelled")  # facts of a data set that must not change within a run


def data_files(path: str, apart: Collection[str] = ()) -> dict[str, int]:
    """Name and size of every file of a local data set, hidden ones and those of runs and in the folders `apart` (real
    paths) excepted; empty for any other."""
    sizes: dict[str, int] = {}
    seen = {*apart}
    for folder, folders, names in os.walk(path, followlinks=True):  # of a file: nothing
        real = os.path.realpath(folder)
        if real in seen or (folder != path and not RUN_FILES.isdisjoint(names)):  # a circle of links; a run, as this
            folders.clear()
            continue
        seen.add(real)
        before = "" if folder == path else f"{os.path.relpath(folder, path)}/"
        for file, name in ((os.path.join(folder, name), before + name) for name in names):
            if os.path.isfile(file) and not name.startswith(".") and "/." not in name:
                sizes[name] = os.stat(file).st_size
    if os.path.isfile(path):
        sizes = {os.path.basename(path): os.stat(path).st_size}
    return dict(sorted(sizes.items()))


def _data_record(recipe: Recipe, data: TaskData) -> dict[str, object]:
    facts = {key: data.facts.get(key) for key in COMPARED}
    caches = (teacher.cache for teacher in recipe.named_teachers().values())
    apart = [os.path.realpath(cache.folder) for cache in caches if cache is not None]
    files, more = data_files(str(recipe.data.path), apart), recipe.data.unlabelled
    if more is not None and more != recipe.data.path:
        files |= {f"{more}: {name}": size for name, size in data_files(more, apart).items()}
    for phase in recipe.phases or ():
        for path in {str(phase.data[key]) for key in ("path", "unlabelled") if phase.data.get(key) is not None}:
            files |= {f"{path}: {name}": size for name, size in data_files(path, apart).items()}
    return {**facts, "files": files}


def _differences(then: dict[str, object], now: dict[str, object]) -> list[str]:
    """What differs between two records of a data set, class names first."""
    told = [f"{key}: {then.get(key)} -> {now[key]}" for key in COMPARED if then.get(key) != now[key]]
    old, new = (dict(record.get("files") or {}) for record in (then, now))  # type: ignore[call-overload]
    told += [f"{name} is missing" for name in old if name not in new]
    told += [f"{name} is new" for name in new if name not in old]
    grown = [name for name, size in new.items() if old.get(name, size) not in (size, None)]
    told += [f"{name}: {old[name]} -> {new[name]} bytes" for name in grown]
    return told
