"""What is finished, and what a person has corrected since: the records of a labelled set.

While images are labelled each process appends to a journal of its own, so that a killed run loses at most the images
of one batch; at the end the journals become `label.jsonl`, which also holds what was written of each image.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cankd_hf.errors import InputError
from cankd_hf.hub.files import read_json
from cankd_hf.label.images import Picture
from cankd_hf.names import LABEL_RECORDS

HIDDEN = ".label"
Record = dict[str, Any]


def content_hash(content: bytes) -> str:
    """128-bit hash of a file's content."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def line_hash(line: Mapping[str, Any]) -> str:
    """The same of a line of metadata, whatever the order of its keys."""
    return content_hash(json.dumps(line, sort_keys=True).encode())


class Records:
    """The records in an output folder.

    Args:
        out: the output folder.
        process: number of this process, whose journal is written.
    """

    def __init__(self, out: Path, process: int = 0) -> None:
        self.out, self.file = out, out / LABEL_RECORDS
        self.journal = out / HIDDEN / f"journal-{process}.jsonl"
        self._begun = False

    def read(self) -> dict[str, Record]:
        """Source -> its last record; those of the journals come after those of the last finished call."""
        found: dict[str, Record] = {}
        for file in [self.file, *sorted((self.out / HIDDEN).glob("journal-*.jsonl"))]:
            for record in _lines(file, last_may_lack=file != self.file):
                if "source" in record:
                    found[record["source"]] = {**record, **_written(found.get(record["source"]), record)}
        return found

    def costs(self) -> dict[str, float]:
        """Seconds by name, of all calls and processes until now."""
        total: dict[str, float] = {}
        before = read_json(self.out / HIDDEN / "cost.json")
        sessions: dict[str, dict[str, float]] = {}
        for file in sorted((self.out / HIDDEN).glob("journal-*.jsonl")):
            for record in _lines(file, last_may_lack=True):
                if "session" in record:
                    sessions[record["session"]] = record["cost"]
        for cost in [before, *sessions.values()]:
            for name, seconds in cost.items():
                total[name] = round(total.get(name, 0.0) + seconds, 3)
        return total

    def append(self, records: Iterable[Record]) -> None:
        """Adds records to this process's journal."""
        text = "".join(f"{json.dumps(record)}\n" for record in records)
        self.journal.parent.mkdir(exist_ok=True)
        with self.journal.open("a", encoding="utf-8") as file:
            file.write(text if self._begun else f"\n{text}")  # a killed call may have left half a line
        self._begun = True

    def finish(self, records: Iterable[Record], cost: Mapping[str, float]) -> None:
        """Makes `label.jsonl` of all records, and ends the journals."""
        write(self.out / HIDDEN / "cost.json", json.dumps(dict(cost)).encode())
        write(self.file, "".join(f"{json.dumps(record)}\n" for record in records).encode())
        for journal in (self.out / HIDDEN).glob("journal-*.jsonl"):
            journal.unlink()

    def corrected(self, record: Record) -> bool:
        """Whether a file that was written of this image is another one now."""
        return any(
            (self.out / name).is_file() and content_hash((self.out / name).read_bytes()) != known
            for name, known in record.get("files", {}).items()
        )

    def whole(self, record: Record) -> bool:
        """Whether all files that were written of this image are there."""
        return all((self.out / name).is_file() for name in record.get("files", {}))


def unchanged(picture: Picture, record: Record | None) -> bool:
    """Whether a record is of the picture as it is now."""
    return record is not None and (picture.stat is None or picture.stat == record.get("stat"))


def write(file: Path, content: bytes) -> None:
    """Writes a file aside and renames it into place, so that it is never there in part."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def read_lines(file: Path) -> list[Record]:
    """The lines of a metadata file; empty without one."""
    return list(_lines(file))


def _lines(file: Path, last_may_lack: bool = False) -> Iterator[Record]:
    """Objects of a file with one JSON object a line; of a journal, a line that was cut off by a kill is left out."""
    if not file.is_file():
        return
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if isinstance(found, dict):
            yield found
        elif not last_may_lack:
            raise InputError(f"{file} line {number}: expected a JSON object, got {line[:60]!r}; correct the line")


def _written(before: Record | None, record: Record) -> Record:
    """What the last finished call wrote in the metadata, which a newer record does not say."""
    if before is None or "line" in record or "line" not in before:
        return {}
    return {"line": before["line"]}
