"""Unlabelled images that are also scored: what a student learned of them would count as knowledge of others."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from cankd_hf.data.common.dataset import AnySource, StreamSource
from cankd_hf.data.common.decode import Data, Unusable
from cankd_hf.data.common.folders import FolderSource
from cankd_hf.data.common.hashes import refuse_shared
from cankd_hf.data.common.progress import told
from cankd_hf.data.common.tables import TableSource


def refuse_leaks(
    unlabelled: tuple[AnySource, Sequence[int]], scored: Mapping[str, tuple[AnySource, Sequence[int]]]
) -> None:
    """Compares the files of unlabelled images with those of splits that are scored, by name of the split.

    Where files on both sides have one size in bytes their contents are hashed. Of generated
    images the names are compared; streams are not looked at.

    Raises:
        InputError: with the names of the files that are on both sides.
    """
    source, indices = unlabelled
    if not isinstance(source, StreamSource) and source.generated:
        names = {source.name(index) for index in indices}
        generated = ((role, other, places) for role, (other, places) in scored.items())
        refuse_unlabelled(
            [
                f"{other.name(place)} ({role})"
                for role, other, places in generated
                if not isinstance(other, StreamSource) and other.generated
                for place in places
                if other.name(place) in names
            ]
        )
    parts = {
        name: (other, places)
        for name, (other, places) in scored.items()
        if isinstance(other, FolderSource | TableSource)
    }
    if isinstance(source, FolderSource | TableSource) and parts:
        refuse_unlabelled(shared_files((source, indices), parts))


def shared_files(
    files: tuple[FolderSource | TableSource, Sequence[int]],
    others: Mapping[str, tuple[FolderSource | TableSource, Sequence[int]]],
) -> list[str]:
    """Files whose content is that of a file in another split too, each `name = other name (split)`.

    Where files on both sides have one size in bytes their contents are hashed.

    Args:
        files: a source, and indices in it.
        others: the same by name of the split.
    """
    source, indices = files
    sizes: dict[int, list[tuple[str, int]]] = {}
    for name, (other, places) in others.items():
        for place in places:
            sizes.setdefault(_size(other, place), []).append((name, place))
    digests: dict[int, dict[bytes, str]] = {}
    found = []
    for index in told(indices, "comparing images", len(indices)):
        size = _size(source, index)
        if size <= 0 or size not in sizes:
            continue
        if size not in digests:
            named = {_digest(others[name][0], place): (name, place) for name, place in sizes[size]}
            digests[size] = {key: f"{others[name][0].name(place)} ({name})" for key, (name, place) in named.items()}
        if other_name := digests[size].get(_digest(source, index)):
            found.append(f"{source.name(index)} = {other_name}")
    return found


def refuse_unlabelled(found: list[str]) -> None:
    """Raises InputError for pictures that are unlabelled and scored, each `name = other name (split)`."""
    refuse_shared(found, "data.unlabelled", "leave them out")


def _content(source: FolderSource | TableSource, index: int) -> Data | None:
    """The file of an image or what it holds; None for a row without one."""
    try:
        return source.content(index)
    except Unusable:  # told of where it is decoded
        return None


def _size(source: FolderSource | TableSource, index: int) -> int:
    content = _content(source, index)
    if isinstance(content, Path):
        return os.stat(content).st_size if os.path.isfile(content) else 0
    return 0 if content is None else len(content)


def _digest(source: FolderSource | TableSource, index: int) -> bytes:
    content = _content(source, index) or b""
    return hashlib.blake2b(content.read_bytes() if isinstance(content, Path) else content, digest_size=16).digest()
