"""The files of the output: images, labels and metadata, of which what a person changed is never overwritten."""

import io
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from cankd_hf.label.images import Picture
from cankd_hf.label.records import Record, line_hash, read_lines, write

METADATA = "metadata.jsonl"


@dataclass
class Merged:
    """The lines of a split, and what a person did to them."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    corrected: int = 0
    removed: int = 0


class Output:
    """The output folder.

    Args:
        out: its place.
        split: folder of the split with the teacher's labels.
        link: images are hard links where the disk allows it, instead of copies.
    """

    def __init__(self, out: Path, split: str, link: bool) -> None:
        self.out, self.split, self.link = out, split, link

    def put(self, name: str, content: bytes) -> None:
        """Writes a file by its name in the output."""
        write(self.out / name, content)

    def put_image(self, picture: Picture, image: Tensor) -> None:
        """Copies an image, or links to it; one without a file is written as PNG. One that is there stays."""
        self.put_picture(f"{self.split}/{picture.file_name}", picture.file, image)

    def put_picture(self, name: str, file: Path | None, image: Tensor) -> None:
        """The same by the name in the output."""
        target = self.out / name
        if target.is_file():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        if file is None:
            buffer = io.BytesIO()
            Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(buffer, format="png")
            write(target, buffer.getvalue())
            return
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            if not (self.link and _linked(file.resolve(), partial)):
                shutil.copyfile(file, partial)
            partial.replace(target)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    def merge(self, split: str, written: Iterable[tuple[Record, dict[str, Any]]], gone: Iterable[str]) -> Merged:
        """The lines of a split: those to write, a person's own where there is one.

        Args:
            split: its folder.
            written: records and their lines; a record learns the hash of its line.
            gone: names of images that may not be in it.

        Returns:
            Lines that a person changed as they are, none that a person removed, and at the end those that a person
            added.
        """
        file, merged, absent = self.out / split / METADATA, Merged(), set(gone)
        old = {str(line.get("file_name")): line for line in read_lines(file)}
        for record, line in written:
            before, there = record.get("line"), old.pop(line["file_name"], None)
            if before is not None and there is None and file.is_file():
                merged.removed += 1
                continue
            if before is not None and there is not None and line_hash(there) != before:
                merged.corrected += 1
                merged.lines.append(there)
                continue
            record["line"] = line_hash(line)
            merged.lines.append(line)
        merged.lines += [line for name, line in old.items() if name not in absent]
        text = "".join(f"{json.dumps(line)}\n" for line in merged.lines)
        write(file, text.encode())
        return merged

    def drop(self, record: Record, corrected: bool) -> None:
        """Removes the files of an image that may not be in the set any more, unless a person has changed them."""
        if not corrected:
            for name in [*record.get("files", {}), f"{self.split}/{record['file_name']}"]:
                (self.out / name).unlink(missing_ok=True)


def _linked(file: Path, place: Path) -> bool:
    try:
        os.link(file, place)
    except OSError:  # another disk, or one without links
        return False
    return True
