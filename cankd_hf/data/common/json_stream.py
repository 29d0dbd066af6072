"""Reads the lists of a large JSON file one element at a time, so that the whole of it is never in memory."""

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

from cankd_hf.data.common.files import not_a_file
from cankd_hf.data.common.progress import Told

PIECE = 2**22  # characters that are read at once
_SPACE = re.compile(r"[ \t\n\r]*")
_COMMA = re.compile(r"[ \t\n\r]*,[ \t\n\r]*")


class NotPlain(Exception):
    """The file is not what can be read piece by piece; reading it whole says what is wrong, if anything is."""


def elements(path: Path, wanted: Collection[str], limit: int) -> Iterator[tuple[str, Any]]:
    """(key, element) of the lists under the `wanted` keys of the object that a JSON file in UTF-8 holds, in its order.

    Other values are parsed and dropped, a wanted one that is no list, or has its key twice, is not plain.

    Raises:
        NotPlain: for anything but such a file of at most `limit` bytes, which may be after many elements.
    """
    if not_a_file(path) or path.stat().st_size > limit:
        raise NotPlain
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _Text(file, path).elements(wanted)
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise NotPlain from error


class _Text:
    """The text of a file, of which a piece is in memory."""

    def __init__(self, file: IO[str], path: Path) -> None:
        self.file, self.text, self.at, self.ended = file, "", 0, False
        self.told = Told(f"reading {path.name}", path.stat().st_size)
        self.scan: Any = json.JSONDecoder().scan_once  # type: ignore[attr-defined]

    def elements(self, wanted: Collection[str]) -> Iterator[tuple[str, Any]]:
        seen: set[str] = set()
        with self.told:
            self.expect("{")
            while self.sign() != "}":
                if seen:
                    self.expect(",")
                key = self.value()
                if not isinstance(key, str) or key in seen:
                    raise NotPlain
                seen.add(key)
                self.expect(":")
                if key not in wanted:
                    self.value()
                    continue
                self.expect("[")
                if self.sign() != "]":
                    yield key, self.value()
                while self.comma():
                    yield key, self.value()
                self.expect("]")
            self.expect("}")
            if self.sign():
                raise NotPlain

    def sign(self) -> str:
        """The next character that is no space; none at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def comma(self) -> bool:
        """Whether the next character is a comma; it is taken, with the spaces after it."""
        found = _COMMA.match(self.text, self.at)
        if found is None:
            if self.sign() != ",":
                return False
            self.at += 1
            return True
        self.at = found.end()
        return True

    def expect(self, sign: str) -> None:
        if self.sign() != sign:
            raise NotPlain
        self.at += 1

    def value(self) -> Any:
        """The next value."""
        while True:
            try:
                value, end = self.scan(self.text, self.at)
            except (StopIteration, ValueError):  # it begins after spaces, ends in a later piece, or is wrong
                end = len(self.text)
            if end < len(self.text):
                self.at = end
                return value
            start = self.at
            if self.sign() and self.at > start:
                continue
            if not self.more():
                raise NotPlain

    def more(self) -> bool:
        """Reads on; a long value is read in pieces that double."""
        rest = self.text[self.at :]
        piece = self.file.read(max(PIECE, len(rest)))
        self.text, self.at = rest + piece, 0
        self.told.to(self.file.buffer.tell())  # type: ignore[attr-defined]
        return bool(piece)
