"""Names of folders, files and Hub ids that a person typed: what is here, what was meant, what the Hub is asked for."""

import difflib
import glob
import os
import re
import socket
import sys
from collections.abc import MutableMapping
from pathlib import Path
from urllib.parse import urlsplit

from cankd_hf.errors import InputError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_MOST = 20_000  # entries of a folder that are compared with a name
_NEAR = 0.6  # of `difflib`, as for keys
_TRUE = ("1", "ON", "YES", "TRUE")  # as huggingface_hub reads them
_PROXIES = ("all_proxy", "https_proxy", "http_proxy")


def is_there(name: str) -> bool:
    """Whether a file, a folder, or a file that matches a pattern is here."""
    return os.path.exists(name) or (any(sign in name for sign in "*?[") and bool(glob.glob(name)))


def absent(name: str) -> str | None:
    """Why a name stands for nothing here and on the Hub: "nothing is there; did you mean ...?"; None if it may stand
    for something, which is not looked for.

    `runs/x` is no Hub id where a folder `runs` is, unless the cache of the Hub holds a model or data set of that name.
    """
    if is_there(name):
        return None
    if "://" in name:
        return "no address is fetched: download it, unpack it and name the folder"
    if not _HUB_ID.fullmatch(name):
        return f"nothing is there{_meant(name)}"
    owner, slash, _ = name.partition("/")
    if not slash or not os.path.isdir(owner) or _cached(name):
        return None
    return f"nothing is there{_meant(name) or f', and with a folder {owner} here it is not looked for on the Hub'}"


def hint(name: str) -> str:
    """ "; did you mean ...?" with what is here under a similar name; "" where nothing is."""
    return "" if is_there(name) else _meant(name)


def check_named(place: str, name: str, expected: str, cached: bool = False) -> None:
    """Checks what a command is to load, before its libraries are; for a Hub id, works offline where the Hub cannot be
    reached.

    Args:
        place: of the name, for messages; or the name itself, of a model, which is a folder.
        name: that was typed.
        expected: what it may be, for messages.
        cached: whether the Hub's libraries keep what they load under this name: offline, other names are refused.

    Raises:
        InputError: if the name can stand for nothing, or is a file where a model is named.
    """
    if place == name and os.path.isfile(name):
        raise InputError(f"{place}: expected {expected}, got a file; name its folder")
    missing = absent(name)
    if missing is None and not reachable(name) and cached:
        missing = f"nothing is there{_meant(name) or ', nor in the cache of the Hub, which cannot be reached'}"
    if missing is not None:
        got = "found none" if place == name else f"got {name[:300]!r}"
        raise InputError(f"{place}: expected {expected}, {got}; {missing}")


def reachable(name: str) -> bool:
    """Whether what a name stands for is here, in the cache of the Hub, or the Hub can be asked for it."""
    return is_there(name) or settle_hub() or _cached(name)


def settle_hub(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Whether the Hub may be reached. Where its name does not resolve, its libraries work offline from now on, as with
    HF_HUB_OFFLINE=1: each request would be repeated for 25 seconds, and fail."""
    loaded = sys.modules.get("huggingface_hub.constants")
    asked = [environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")]
    if getattr(loaded, "HF_HUB_OFFLINE", any(value.upper() in _TRUE for value in asked)):
        return False
    if any(environ.get(name) or environ.get(name.upper()) for name in _PROXIES):
        return True
    address = urlsplit(environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        socket.getaddrinfo(address.hostname, address.port or 443)
    except OSError:
        environ["HF_HUB_OFFLINE"] = "1"  # of libraries and processes that start later; the others have read it already
        for module in (loaded, sys.modules.get("datasets.config")):
            if module is not None:
                module.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
        return False
    return True


def _cached(name: str) -> bool:
    """Whether the cache of the Hub, or that of `datasets`, holds something of this name."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    hub = os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")
    hub = getattr(sys.modules.get("huggingface_hub.constants"), "HF_HUB_CACHE", hub)
    sets = os.environ.get("HF_DATASETS_CACHE") or os.path.join(home, "datasets")
    flat = name.replace("/", "--")
    places = [os.path.join(hub, f"{kind}--{flat}") for kind in ("models", "datasets")]
    return any(map(os.path.isdir, [*places, os.path.join(sets, name.replace("/", "___"))]))


def _meant(name: str) -> str:
    found = nearest_place(name)
    return "" if found is None else f"; did you mean {found!r}?"


def nearest_place(name: str) -> str | None:
    """The path that is here and whose parts are most like those of a name; None if one of them is like nothing."""
    try:
        base = Path(Path(name).anchor or ".")
        for part in Path(name).expanduser().parts[bool(Path(name).anchor) :]:
            if os.path.lexists(base / part):
                base /= part
                continue
            found = _nearest(part, base)
            if found is None:
                return None
            base /= found
    except (OSError, ValueError, RuntimeError):  # no right to look, a NUL byte, no home
        return None
    return str(base)


def _nearest(part: str, folder: Path) -> str | None:
    with os.scandir(folder) as entries:
        names = [entry.name for entry, _ in zip(entries, range(_MOST), strict=False) if entry.name[0] != "."]
    folded = {name.casefold(): name for name in sorted(names, reverse=True)}
    close = difflib.get_close_matches(part.casefold(), folded, n=1, cutoff=_NEAR)
    return folded[close[0]] if close else None
