"""Reads the small files of a data set safely: regular files inside its folder, of bounded size, and any JSON.

A data set comes from strangers. A FIFO or a device would block or never end, a link could show any file of this
machine, and a nested or huge JSON value would stop the parser with an error that names no file.
"""

import gc
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from reprlib import Repr
from typing import Any

from cankd_hf.errors import InputError

LABELS_LIMIT = 2**26  # bytes of a file with class names
COCO_LIMIT = 2**33  # bytes of a COCO json; the largest in use has 6 GB
LINE_LIMIT = 2**25  # characters of one line of metadata
KINDS: dict[str, Callable[[int], bool]] = {
    "a folder": stat.S_ISDIR,
    "a FIFO": stat.S_ISFIFO,
    "a socket": stat.S_ISSOCK,
    "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
}
# Relative paths of letters that every disk holds, which need no further look; most are of this form.
USUAL_NAME = re.compile(r"(?:[A-Za-z0-9_-][A-Za-z0-9_.-]{,199}/){,9}[A-Za-z0-9_-][A-Za-z0-9_.-]{,199}")
SHOWN = 20  # problems listed one by one; the rest is counted

_repr = Repr()
_repr.maxlevel, _repr.maxlist, _repr.maxdict, _repr.maxstring, _repr.maxother, _repr.maxlong = 2, 6, 6, 80, 60, 40


def shown(value: Any) -> str:
    """A value as in Python, cut to about a line, however deep or long it is."""
    try:
        return _repr.repr(value)
    except ValueError:  # a whole number with more digits than Python prints
        return f"a {type(value).__name__} of thousands of digits"


def shortened(problems: list[str]) -> list[str]:
    """The first problems, and the number of the others."""
    if len(problems) <= SHOWN:
        return problems
    return [*problems[:SHOWN], f"... and {len(problems) - SHOWN} more of {len(problems)}"]


def not_a_file(path: Path) -> str | None:
    """Why a path cannot be read as a file, such as `a FIFO`; None if it can."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "no file"
    except (OSError, ValueError) as error:  # too long a name, a circle of links, no permission, a NUL in the name
        return getattr(error, "strerror", None) or str(error)
    return next((kind for kind, is_kind in KINDS.items() if is_kind(mode)), None)


def path_problem(place: str, key: str, line: dict[str, Any]) -> str | None:
    """The problem with the path under a key, if any."""
    value = line.get(key)
    if isinstance(value, str) and USUAL_NAME.fullmatch(value):
        return None
    if key not in line or value is None or value == "":
        return f"{place}: expected the key {key!r} with a file name, got the keys {shown(list(line))}"
    if not isinstance(value, str):
        return f"{place}: expected a file name as text under {key!r}, got {shown(value)}"
    windows, posix = PureWindowsPath(value), PurePosixPath(value)
    if posix.is_absolute() or windows.is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        return f"{place}: expected a relative path without `..` inside the data folder, got {key} = {shown(value)}"
    if "\0" in value or not printable(value) or any(len(os.fsencode(part)) > 255 for part in posix.parts):
        return f"{place}: expected a file name of at most 255 bytes that a disk can hold, got {key} = {shown(value)}"
    return None


def normal_name(value: str) -> str:
    """A relative path without `.` and double slashes, as `Path` writes it."""
    return value if USUAL_NAME.fullmatch(value) else PurePosixPath(value).as_posix()


def printable(text: str) -> bool:
    """Whether a text can be written as UTF-8; JSON can hold halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def outside(root: Path, paths: Iterable[Path | str]) -> list[str]:
    """A problem for each file, or the folder of several, that links lead out of the folder `root`.

    The cache of the Hub, which consists of links, counts as inside.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    real = os.path.realpath(root)
    allowed = tuple(os.path.join(os.path.realpath(folder), "") for folder in (real, HF_HUB_CACHE))
    folders: dict[str, str] = {}  # the real folder of each that is inside
    links: dict[str, str] = {}
    for given in paths:
        path = os.fspath(given)
        parent, name = os.path.split(path)
        if parent not in folders:
            folders[parent] = os.path.realpath(parent)
            if not os.path.join(folders[parent], "").startswith(allowed):
                links[parent] = folders[parent]
        target = os.path.join(folders[parent], name)
        if (
            parent not in links
            and os.path.islink(target)
            and not (target := os.path.realpath(target)).startswith(allowed)
        ):
            links[path] = target
    return [
        f"{relative_to(Path(path), root)}: expected a file or folder inside the data folder {root}, got a link to "
        f"{target}; copy what it holds, or name the folder that holds it as data.path"
        for path, target in links.items()
    ]


def relative_to(path: Path, root: Path) -> str:
    """Name of a file in the data folder; the whole path of one outside."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def read_json(path: Path, place: str, limit: int, unique: bool = False) -> Any:
    """The content of a JSON file in UTF-8, with or without a byte order mark.

    Raises:
        InputError: for what is no regular file, larger than `limit` bytes, or no JSON, and if `unique` for an object
            with a key twice; it begins with `place`.
    """
    if problem := not_a_file(path):
        raise InputError(f"{place}: expected a json file, got {path}, which is {problem}")
    if (size := path.stat().st_size) > limit:
        raise InputError(f"{place}: expected a json file of at most {limit} bytes, got {path} with {size}")
    try:
        with path.open("rb") as file:
            head = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
            if size > 1024 and not head.startswith((b"{", b"[")):
                raise InputError(f"{place}: {path} is not valid json: it begins with {shown(head[:20])}")
            file.seek(0)
            return parse(file.read(limit + 1).decode("utf-8-sig"), f"{place}: {path} is", unique)
    except (OSError, UnicodeDecodeError, MemoryError) as error:
        raise InputError(f"{place}: expected a json file in UTF-8, got {path}: {error or 'too large'}") from None


def parse(text: str, place: str, unique: bool = False) -> Any:
    """The value of a JSON text; InputError `PLACE not valid json: ...` for none, and for what Python cannot hold."""
    collects = gc.isenabled()
    gc.disable()  # deep inside a nested value no finalizer could run; and large files are read in half the time
    try:
        return json.loads(text, object_pairs_hook=_once if unique else None)
    except RecursionError:
        problem = "it is nested too deeply"
    except ValueError as error:  # of which JSONDecodeError is one; numbers with too many digits are others
        problem = str(error).split(";")[0]
    finally:
        if collects:
            gc.enable()
    raise InputError(f"{place} not valid json: {problem}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; ValueError if a key is in it twice, of which Python takes the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {shown(next(key for key in keys if keys.count(key) > 1))} is in it twice")
    return found


def read_lines(path: Path) -> Iterator[str]:
    """Lines of a text file in UTF-8, with their ends.

    Raises:
        InputError: for what is no regular file, no UTF-8, or has a line that no table has.
    """
    if problem := not_a_file(path):
        raise InputError(f"{path}: expected a text file, got {problem}")
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline=None) as file:
            while line := file.readline(LINE_LIMIT + 1):
                number += 1
                if len(line) > LINE_LIMIT:
                    raise InputError(f"{path} line {number}: expected at most {LINE_LIMIT} characters, got more")
                yield line
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text, got {error}") from None
    except OSError as error:
        raise InputError(f"{path}: expected a text file that can be read, got {error.strerror}") from None
