"""Writes parts of a folder's training split as splits of another folder, with copies of their images and labels.

    python comparisons/cut_splits.py /data/camvid runs/camvid_46 'train=train[::8]' val=val test=test

A set with few labels for `cankd label --labelled`, or whole clips of a video to tune on. Parts are written as in a
recipe (`train[:62]`, `train[::8]-train[:62]`). Both folders have a metadata.jsonl in each split. Splits that are there
already are written anew; others stay.
"""

import json
import shutil
import sys
from pathlib import Path

from cankd_hf.data.common.folders import slice_of


def main(source: Path, target: Path, parts: list[str]) -> None:
    """Copies each `NAME=PART`."""
    for part in parts:
        name, _, wanted = part.partition("=")
        split = slice_of(wanted, 0)[0]
        lines = (source / split / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        chosen = [lines[index] for index in slice_of(wanted, len(lines))[1]]
        for line in map(json.loads, chosen):
            for file in (value for key, value in line.items() if key.endswith("file_name")):
                (target / name / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / split / file, target / name / file)
        (target / name / "metadata.jsonl").write_text("".join(f"{line}\n" for line in chosen), encoding="utf-8")
    if (source / "labels.json").is_file():
        shutil.copyfile(source / "labels.json", target / "labels.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
