"""Checkpoint folders on disk: written aside, listed with their digests, and renamed into place."""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.trainer_utils import sort_checkpoints

from cankd_hf.errors import InputError
from cankd_hf.models.finite import named, not_finite
from cankd_hf.names import STATE_FILE

logger = logging.getLogger(__name__)
Found = TypeVar("Found")

LIST_FILE = "checkpoint_files.json"  # written last: a folder that has it was written to the end
ASIDE = ".partial"  # subfolder of a run in which checkpoints are written, and deleted
PROBE = 1 << 20  # bytes written to see whether a folder takes files
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
_SAVED_BY_TORCH = ("optimizer.", "scheduler.", "rng_state")
_NAME = re.compile(r"checkpoint-(\d+)")
# What torch.save raises when the disk is full is a plain RuntimeError.
_WRITE_FAILED = re.compile(r"PytorchStreamWriter|file write failed|unexpected pos|while serializing|I/O error")


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Lists the files of a folder with their sizes and digests in it, and flushes all of it to the disk.

    Args:
        folder: a checkpoint that is written, but not yet renamed into place.
        facts: plain data to keep in the list.
    """
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": digest(path)}
        _flush(path)
    content = json.dumps({**facts, "files": files}, indent=1, allow_nan=False)
    (folder / LIST_FILE).write_text(content, encoding="utf-8")
    _flush(folder / LIST_FILE)
    for place in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        _flush(place)


def publish(folder: Path, final: Path) -> None:
    """Renames a sealed folder into place; one of the same name is deleted."""
    if final.exists():
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    folder.rename(final)
    _flush(final.parent)
    shutil.rmtree(folder.parent, ignore_errors=True)


def rotate(run: Path, limit: int | None, best: str | None) -> None:
    """Deletes the oldest checkpoints above `save_total_limit`, never the newest or the best one.

    Each is renamed first, so that no half-deleted folder is left under the name of a checkpoint.
    """
    if not limit or limit < 0:
        return
    found = [Path(path) for path in sort_checkpoints(str(run), use_mtime=True)]
    kept = {found[-1].resolve()} if found else set()
    kept |= {Path(best).resolve()} if best else set()
    doomed = [path for path in found if path.resolve() not in kept]
    for path in doomed[: max(0, len(found) - max(limit, len(kept)))]:
        target = run / ASIDE / path.name
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
        shutil.rmtree(target.parent, ignore_errors=True)


def read_list(folder: Path) -> dict[str, Any]:
    """The list of a checkpoint; empty without one. Raises ValueError for a file that is no such list."""
    file = folder / LIST_FILE
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not isinstance(content, dict) or (file.is_file() and "files" not in content):
        raise ValueError(f"{LIST_FILE} is not a list of files")
    return content


def flaw(folder: Path) -> str | None:
    """What makes a checkpoint unusable: missing, changed or unreadable files, or weights that are not finite."""
    if not folder.is_dir():
        return "no such folder"
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        listed = read_list(folder)
        kept = [(name, entry["size"], entry["sha256"]) for name, entry in listed["files"].items()] if listed else []
    except FileNotFoundError:
        return f"{STATE_FILE} is missing"
    except (OSError, ValueError, RecursionError) as error:
        return f"cannot be read: {error}"
    except (AttributeError, KeyError, TypeError):
        return f"{LIST_FILE} is not a list of files"
    if not isinstance(state, dict) or not isinstance(state.get("global_step"), int):
        return f"{STATE_FILE} is not that of a Trainer"
    for name, size, sha256 in kept:
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if digest(file) != sha256:
            return f"{name} was changed after it was saved"
    return (None if listed else _flaw_of_unlisted(folder)) or _flaw_of_weights(folder)


def why_not_resumed(folder: Path) -> str | None:
    """Why training cannot go on from a whole checkpoint; None if it can."""
    if read_list(folder).get("save_only_model"):
        return "it was saved with save_only_model and has no optimizer to go on with"
    return None


def newest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run; unusable ones are renamed to `broken-checkpoint-N` with a warning.

    Raises:
        InputError: if training cannot go on from it.
    """
    _finish_renames(run)
    found = [path for path in run.iterdir() if _NAME.fullmatch(path.name)] if run.is_dir() else []
    for path in sorted(found, key=lambda path: -int(path.name.partition("-")[2])):
        wrong = flaw(path)
        if wrong is None:
            if reason := why_not_resumed(path):
                raise InputError(f"{path}: {reason}; --restart starts over and moves the old run aside")
            return path
        target = next(t for n in range(1000) if not (t := run / f"broken-{path.name}{f'.{n}' if n else ''}").exists())
        path.rename(target)
        logger.warning("%s: %s; it is set aside as %s and not used", path, wrong, target.name)
    return None


def chosen(run: Path, main: bool) -> Path | None:
    """As `newest`, decided by the main process for all processes."""
    return by_main(main, lambda: newest(run))


def check_whole(folder: Path, main: bool) -> None:
    """Checks a checkpoint before it is used; the main process reads it for all.

    Raises:
        InputError: if a file is missing, changed or unreadable.
    """

    def check() -> None:
        if wrong := flaw(folder):
            raise InputError(f"{folder}: {wrong}; use another checkpoint, or start over without one")

    by_main(main, check)


def by_main(main: bool, act: Callable[[], Found]) -> Found:
    """What the main process finds, or its InputError, in all processes."""
    answer: list[Any] = [None, None]
    if main:
        try:
            answer[0] = act()
        except InputError as error:
            answer[1] = error.problems
    found, problems = broadcast_object_list(answer)
    if problems:
        raise InputError(problems)
    return cast(Found, found)


def check_folder(out: Path, place: str = "output_dir") -> None:
    """Creates the output folder, and tries to write into it.

    Raises:
        InputError: with the reason, if it is no folder, or takes no files.
    """
    probe = out / f".probe.{os.getpid()}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(bytes(PROBE))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror if os.path.isdir(out) or not os.path.lexists(out) else "it is not a folder"
        raise InputError(f"{place} {_short(out)}: cannot be written to: {reason}; name another folder") from error


@contextmanager
def writing(place: Path, only: Collection[int] | None = None) -> Iterator[None]:
    """Turns failures to write, such as a full disk, into one line.

    Args:
        place: what is written.
        only: error numbers of the operating system; None means all.

    Raises:
        InputError: naming the place and the reason.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not isinstance(error, OSError) and not _WRITE_FAILED.search(str(error)):
            raise
        if isinstance(error, OSError) and only is not None and error.errno not in only:
            raise
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        name = getattr(error, "filename", None) or place
        raise InputError(
            f"{name}: could not be written: {reason}; what was saved before is kept. "
            "Make space or give access, and the same command goes on"
        ) from error


def digest(file: Path) -> str:
    """sha256 of a file."""
    made = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            made.update(block)
    return made.hexdigest()


def _short(path: Path) -> str:
    name = str(path)
    return name if len(name) <= 120 else f"{name[:60]}...{name[-20:]} ({len(name)} characters)"


def _flaw_of_unlisted(folder: Path) -> str | None:
    """The same for a checkpoint without a list: of an earlier version, or of the stock Trainer."""
    names = [path.name for path in folder.iterdir()]
    needed = {
        "the student's weights": ["model", "pytorch_model"],
        "the optimizer": ["optimizer", "global_step"],  # DeepSpeed's folder holds optimizer and scheduler
        "the scheduler": ["scheduler", "global_step"],
        "the random states": ["rng_state"],
    }
    missing = [what for what, starts in needed.items() if not any(name.startswith(tuple(starts)) for name in names)]
    if missing:
        return f"{' and '.join(missing)} missing"
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return next((wrong for file in files if (wrong := _unreadable(file))), None)


def _flaw_of_weights(folder: Path) -> str | None:
    for file in sorted(folder.glob("*.safetensors")):
        try:
            bad = not_finite(load_file(file))
        except (OSError, SafetensorError) as error:
            return f"{file.name} cannot be read: {error}"
        if bad:
            return f"{file.name}: expected finite weights, got {named(bad)}"
    return None


def _unreadable(file: Path) -> str | None:
    """Why a file of a Trainer is not what its name says."""
    try:
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        elif file.name.startswith(_SAVED_BY_TORCH):
            with zipfile.ZipFile(file) as archive:  # torch.save writes zip files, with checksums
                archive.testzip()
    except (OSError, ValueError, RecursionError, zipfile.BadZipFile) as error:
        return f"{file.name} cannot be read: {error}"
    return None


def _finish_renames(run: Path) -> None:
    """Puts whole checkpoints in place whose process ended just before their rename, and removes what was partial."""
    for folder in sorted((run / ASIDE).glob("checkpoint-*")):
        final = run / folder.name.removesuffix(".old")
        if (folder / LIST_FILE).is_file() and not final.exists() and flaw(folder) is None:
            folder.rename(final)
    shutil.rmtree(run / ASIDE, ignore_errors=True)


def _flush(path: Path) -> None:
    """Waits until a file or the entries of a folder are on the disk."""
    if path.is_dir() and os.name != "posix":
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
