"""Files of stores: written aside and renamed into place, on disks that have room for them."""

import json
import os
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cankd_hf.errors import InputError
from cankd_hf.models.weight_files import share

HEADER, ASIDE = "header.json", ".partial-"
MARGIN = 256 << 20  # bytes of disk that are left free
OLD = 3600.0  # seconds after which a file that was not finished belongs to nobody


def check_free(folder: Path, size: float) -> None:
    """Raises `InputError` where the disk of a folder has not this many bytes, and `MARGIN` beside them."""
    free = shutil.disk_usage(folder).free
    if size + MARGIN > free:
        raise InputError(
            f"teacher.cache.folder: {folder} needs {size / 1e9:.2f} GB and {MARGIN / 1e9:.2f} GB to spare, and its "
            f"disk has {free / 1e9:.2f} GB; free some, name another folder, or take fewer views or a smaller codec"
        )


def read_header(folder: Path) -> dict[str, Any] | None:
    """The header of the store in a folder; None if there is none.

    Raises:
        InputError: for one that cannot be read, or whose codec cannot.
    """
    try:
        header: dict[str, Any] = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        known = header["identity"], header["codecs"], header["row_bytes"], header["seconds"], header["machine"]
        if name := header.get("codec_file"):
            load_file(folder / name)
        return header if all(known) else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise InputError(
            f"{folder}: expected a store of answers, got what cannot be read ({' '.join(str(error).split())}); "
            "delete it"
        ) from error


def clean(folder: Path) -> None:
    """Deletes what processes that were killed left unfinished."""
    for path in folder.glob(f"{ASIDE}*"):
        with suppress(FileNotFoundError):  # another process does the same
            if time.time() - path.stat().st_mtime > OLD:
                path.unlink()


def stores_in(folder: Path) -> Iterable[Path]:
    """The folders of all stores in a folder."""
    return sorted(path.parent for path in folder.glob(f"*/{HEADER}"))


def publish_once(aside: Path, final: Path) -> bool:
    """Gives a file its name, unless there is one; whether it got it."""
    try:
        os.link(aside, final)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if final.exists():
            return False
        shutil.copyfile(aside, final.with_suffix(".new"))
        final.with_suffix(".new").replace(final)
    return True


def save(path: Path, tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    """Writes a file aside, flushes it to the disk and renames it into place."""
    aside = path.with_name(f"{ASIDE}{path.name}")
    try:
        save_file(tensors, aside, metadata=facts)
        share(aside)
        with aside.open("rb") as stream:
            os.fsync(stream.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
