"""Stores: folders with rows of bytes by the identity of a picture, that several processes read and add to at once.

```
FOLDER/ID/header.json              what the rows are; written once, last of the files it names
FOLDER/ID/codec-WRITER.safetensors the fitted values of the codecs
FOLDER/ID/WRITER-00000.safetensors rows; written aside and renamed, never changed
FOLDER/ID/uses/WRITER.json         how often a run found an answer
```
"""

from __future__ import annotations

import errno
import json
import logging
import os
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from cankd_hf.errors import InputError
from cankd_hf.json_text import to_json
from cankd_hf.teachers.store_files import ASIDE, HEADER, check_free, clean, publish_once, read_header, save

logger = logging.getLogger(__name__)

USES = "uses"
SHARD = 64 << 20  # bytes of rows after which a file is written
SETTLED = 2.0  # seconds after which the time stamp of a folder tells of every change
IDENTITY = 16  # bytes

Cost = dict[str, float]


class Ref(NamedTuple):
    """Where the row of a picture is: which file, and its number there; file -1: not written yet."""

    shard: int
    row: int


class Seen(NamedTuple):
    """What a row is of, to say why another picture does not match."""

    sample: int
    view: int
    height: int
    width: int


@dataclass
class Shard:
    """A file of rows.

    Attributes:
        path: of the file.
        layout: of its rows.
        cost: seconds that each row took, by clock.
        own: whether this run made them, and has paid.
        rows: uint8 `[N, R]`, mapped to the file; None until it is read.
        sums: CRC-32 of each row.
        checked: rows whose sum was compared.
        used: rows that were read, whose cost is to be charged.
    """

    path: Path
    layout: str
    cost: Cost
    own: bool
    sums: list[int]
    rows: Tensor | None = None
    checked: set[int] = field(default_factory=set)
    used: set[int] = field(default_factory=set)


@dataclass
class Pending:
    """Rows that are not written yet; all have one layout."""

    layout: str = ""
    keys: list[bytes] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    cost: Cost = field(default_factory=dict)


class Damaged(Exception):
    """A row that is not what was written."""


class Store:
    """The rows of one teacher, in a folder that `create_store` made.

    Args:
        folder: of this teacher's rows.
        header: the content of its header.
        paid: number of files by writer that this run made before it was interrupted.
        made: whether this run made the store, and has paid for the fit of its codecs.
    """

    def __init__(
        self, folder: Path, header: dict[str, Any], paid: Mapping[str, int] | None = None, made: bool = False
    ) -> None:
        self.made = made or bool(paid)
        self.folder, self.header = folder, header
        self.writer = uuid.uuid4().hex[:12]
        self.paid = dict(paid or {})
        self.written = 0  # files
        self.stopped = ""  # why nothing is written any more
        self._shards: list[Shard] = []
        self._index: dict[bytes, Ref] = {}
        self._damaged: set[Ref] = set()
        self._pending = Pending()
        self._known: dict[str, int] = {}  # files that were looked at -> their size
        self._listed = -1  # time stamp of the folder when it was listed
        self._views: dict[tuple[int, int], Seen] | None = None
        self.refresh()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def fitted(self) -> dict[str, Tensor]:
        """The fitted values of the codecs."""
        name = self.header.get("codec_file")
        return load_file(self.folder / name) if name else {}

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return sum(entry.stat().st_size for entry in self.folder.glob("[!.]*") if entry.is_file())

    # Reading

    def find(self, keys: Sequence[bytes]) -> list[Ref | None]:
        """Where the rows of these pictures are; what other processes have written since is looked for."""
        if not all(key in self._index for key in keys):
            self.refresh()
        return [self._index.get(key) for key in keys]

    def layout(self, ref: Ref) -> str:
        """The layout of a row."""
        return self._pending.layout if ref.shard < 0 else self._shards[ref.shard].layout

    def read(self, refs: Sequence[Ref], pin: bool = False) -> Tensor:
        """The rows uint8 `[len(refs), R]`, all of one layout, in memory of their own.

        Raises:
            Damaged: for a row that is not what was written; it is not found again.
        """
        rows = [self._row(ref) for ref in refs]
        made = torch.empty(len(rows), len(rows[0]), dtype=torch.uint8, pin_memory=pin)
        for place, row in zip(made, rows, strict=True):
            place.copy_(row)
        return made

    def _row(self, ref: Ref) -> Tensor:
        if ref.shard < 0:
            return self._pending.rows[ref.row]
        shard = self._shards[ref.shard]
        if shard.rows is None:
            with safe_open(shard.path, "pt") as file:
                shard.rows = file.get_tensor("rows")  # mapped, not read
        row = shard.rows[ref.row]
        if ref.row not in shard.checked:
            if zlib.crc32(row.numpy().data) != shard.sums[ref.row]:
                self._leave_out(ref)
                raise Damaged(f"{shard.path}: row {ref.row} is not what was written")
            shard.checked.add(ref.row)
        shard.used.add(ref.row)
        return row

    def _leave_out(self, ref: Ref) -> None:
        """Forgets a row, for another of the same picture if there is one."""
        self._damaged.add(ref)
        self._index = {key: known for key, known in self._index.items() if known.shard < 0}
        for number, shard in enumerate(self._shards):
            with safe_open(shard.path, "pt") as file:
                self._enter(number, file.get_tensor("keys"))

    def _enter(self, number: int, keys: Tensor) -> None:
        content = keys.numpy().tobytes()
        for row, start in enumerate(range(0, len(content), IDENTITY)):
            if Ref(number, row) not in self._damaged:
                self._index.setdefault(content[start : start + IDENTITY], Ref(number, row))

    def refresh(self) -> None:
        """Looks for files that were added; torn ones are left out with a warning."""
        stamp = self.folder.stat().st_mtime_ns
        if stamp == self._listed:
            return
        self._listed = stamp if time.time() - stamp / 1e9 > SETTLED else -1
        for path in sorted(self.folder.glob("[!.]*-*.safetensors")):  # not what others are writing, which vanishes
            size = path.stat().st_size
            if path.name.startswith("codec-") or self._known.get(path.name) == size:
                continue
            self._known[path.name] = size
            try:
                self._open(path)
            except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
                logger.warning(
                    "%s: is not whole (%s); its answers are computed again, delete it",
                    path,
                    " ".join(str(error).split()),
                )

    def _open(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            facts = file.metadata()
            keys, sums = file.get_tensor("keys"), file.get_tensor("sums").tolist()
        cost = {name: float(value) / max(1, len(sums)) for name, value in json.loads(facts["cost"]).items()}
        writer, _, number = path.stem.rpartition("-")
        own = writer == self.writer or int(number) < self.paid.get(writer, 0)
        self._shards.append(Shard(path, facts["layout"], cost, own, sums))
        self._views = None
        self._enter(len(self._shards) - 1, keys)

    def why_not(self, seen: Seen) -> str:
        """Why a picture was not found, as far as the rows of its sample and view tell."""
        if self._views is None:
            self._views = {(one.sample, one.view): one for one in self._all_seen()}
        known = self._views.get((seen.sample, seen.view))
        if known is None:
            return "no answer for their images and views was stored"
        if (known.height, known.width) != (seen.height, seen.width):
            return "they were padded to another size with the other pictures of their batch"
        return "the pictures changed: the images, their augmentation, its seed or the libraries that draw it"

    def _all_seen(self) -> Iterator[Seen]:
        for shard in self._shards:
            with safe_open(shard.path, "pt") as file:
                yield from (Seen(*row) for row in file.get_tensor("seen").tolist())

    # Writing

    def add(self, layout: str, keys: Sequence[bytes], rows: Tensor, seen: Sequence[Seen], cost: Cost) -> None:
        """Keeps rows `[n, R]`, on the CPU, and writes them with others later.

        Args:
            layout: of the rows.
            keys: identities of the pictures.
            rows: the bytes.
            seen: what they are of.
            cost: seconds that they took, by clock.
        """
        pending = self._pending
        if pending.keys and pending.layout != layout:
            self.flush()
            pending = self._pending
        pending.layout = layout
        for name, seconds in cost.items():
            pending.cost[name] = pending.cost.get(name, 0.0) + seconds
        for key, row, one in zip(keys, rows, seen, strict=True):
            if key not in self._index:
                self._index[key] = Ref(-1, len(pending.keys))
                pending.keys.append(key)
                pending.rows.append(row)
                pending.seen.append(one)
        if sum(map(len, pending.rows[:1])) * len(pending.rows) >= SHARD:
            self.flush()

    def flush(self) -> None:
        """Writes what is kept. Where the disk is full or cannot be written, says so once and writes nothing more."""
        pending, self._pending = self._pending, Pending()
        if not pending.keys:
            return
        size = len(pending.rows[0]) * len(pending.rows)
        try:
            if self.stopped:
                raise InputError(self.stopped)
            check_free(self.folder, size)
            self._write(pending)
        except (OSError, SafetensorError, InputError) as error:
            for key in pending.keys:
                self._index.pop(key, None)
            if not self.stopped:
                self.stopped = " ".join(str(error).split())
                logger.warning("%s; nothing more is stored, and what is not is computed live", self.stopped)

    def _write(self, pending: Pending) -> None:
        path = self.folder / f"{self.writer}-{self.written:05}.safetensors"
        tensors = {
            "keys": torch.frombuffer(bytearray(b"".join(pending.keys)), dtype=torch.uint8).view(-1, IDENTITY),
            "rows": torch.stack(pending.rows),
            "sums": torch.tensor([zlib.crc32(row.numpy().data) for row in pending.rows]),
            "seen": torch.tensor(pending.seen),
        }
        save(path, tensors, {"layout": pending.layout, "cost": json.dumps(pending.cost)})
        self.written += 1
        self._known[path.name] = path.stat().st_size
        for key in pending.keys:
            del self._index[key]
        self._open(path)

    def note_use(self, facts: Mapping[str, Any]) -> None:
        """Writes how this run used the store, for `uses`."""
        with suppress(OSError):  # of somebody else, or on a full disk: what a run found is in its results too
            (self.folder / USES).mkdir(exist_ok=True)
            aside = self.folder / USES / f"{self.writer}.partial"
            aside.write_text(to_json(facts), encoding="utf-8")
            aside.replace(aside.with_suffix(".json"))

    # Costs

    def charged(self) -> Cost:
        """Seconds by clock that others spent on the rows that this run has read, each counted once."""
        read = any(shard.used for shard in self._shards)
        total: Cost = dict(self.header.get("cost", {})) if read and not self.made else {}
        for shard in self._shards:
            for name, seconds in shard.cost.items() if shard.used and not shard.own else ():
                total[name] = total.get(name, 0.0) + seconds * len(shard.used)
        return total

    def spent(self) -> Cost:
        """Seconds by clock that all rows took, with the fit of their codecs."""
        total: Cost = dict(self.header.get("cost", {}))
        for shard in self._shards:
            for name, seconds in shard.cost.items():
                total[name] = total.get(name, 0.0) + seconds * len(shard.sums)
        return total

    def price(self, rows: int) -> Cost:
        """Seconds by clock that so many rows take, by those that are written, with the fit of their codecs.

        Raises:
            InputError: where none is written.
        """
        fit: Cost = self.header.get("cost", {})
        written = sum(len(shard.sums) for shard in self._shards)
        if not written:
            why = self.stopped or "look at what the teacher's answers are refused for (`cankd cache --check`)"
            raise InputError(
                f"{self.folder}: expected stored answers, by whose cost others are priced, got none; {why}"
            )
        return {
            name: fit.get(name, 0.0) + (spent - fit.get(name, 0.0)) * rows / written
            for name, spent in self.spent().items()
        }


def create_store(folder: Path, header: dict[str, Any], fitted: dict[str, Tensor]) -> Store:
    """Makes a store; where another process was first, its one is returned.

    Raises:
        InputError: if the folder cannot be written.
    """
    writer = uuid.uuid4().hex[:12]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        clean(folder)
        if fitted:
            header = {**header, "codec_file": f"codec-{writer}.safetensors"}
            save(folder / header["codec_file"], {name: one.contiguous() for name, one in fitted.items()}, {})
        aside = folder / f"{ASIDE}{writer}.json"
        with aside.open("w", encoding="utf-8") as stream:
            stream.write(to_json(header))
            stream.flush()
            os.fsync(stream.fileno())
        first = publish_once(aside, folder / HEADER)
        aside.unlink()
        if not first and fitted:
            (folder / header["codec_file"]).unlink()
    except SafetensorError as error:
        raise InputError(f"teacher.cache.folder: {folder} cannot be written ({error}); name another one") from error
    except OSError as error:
        fix = "free some" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "name a folder that can be written"
        raise InputError(f"teacher.cache.folder: {folder} cannot be written ({error.strerror}); {fix}") from error
    return Store(folder, read_header(folder) or header, made=first)
