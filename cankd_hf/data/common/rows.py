"""The lines of a folder: names of images and masks, as bytes in one place.

Hundreds of thousands of objects take a gigabyte, and as each use of an object writes to its counter of references,
every forked loading process ends with a copy of them.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np


@dataclass(frozen=True)
class Row:
    """One line of a folder: an image, its mask if it has one, and their names in the data folder."""

    name: str
    image: Path
    mask: Path | None = None
    mask_name: str = ""


class Rows(Sequence[Row]):
    """Rows, made as they are asked for.

    Args:
        root: the data folder.
        names: of the images, relative to it; absolute for one outside.
        masks: the same of the masks; "" for an image without one. None: no image has one.
    """

    def __init__(self, root: Path, names: Iterable[str], masks: Iterable[str] | None = None) -> None:
        self.root, self.names = root, _Texts(names)
        self.masks = None if masks is None else _Texts(masks)

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        name = self.names[index]
        if self.masks is None or not (mask := self.masks[index]):
            return Row(name, self.root / name)
        return Row(name, self.root / name, self.root / mask, mask)

    def bare(self) -> list[int]:
        """Indices of the images without a mask."""
        return list(range(len(self))) if self.masks is None else self.masks.empty()


class _Texts(Sequence[str]):
    """Texts in one piece of memory."""

    def __init__(self, texts: Iterable[str]) -> None:
        parts = [text.encode("utf-8", "surrogateescape") for text in texts]
        self.content = b"".join(parts)
        self.ends = np.fromiter(itertools.accumulate(map(len, parts), initial=0), np.int64, len(parts) + 1)

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return self.content[self.ends[place] : self.ends[place + 1]].decode("utf-8", "surrogateescape")

    def empty(self) -> list[int]:
        """Indices of the texts without a character."""
        found: list[int] = np.flatnonzero(np.diff(self.ends) == 0).tolist()
        return found
