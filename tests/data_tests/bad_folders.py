"""Small data folders to spoil, and what loading them says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cankd_hf.config.data import DataConfig
from cankd_hf.errors import InputError

from .conftest import NAMES, picture

COCO = "annotations/instances_{split}.json"


def problems_of(load: Any, config: DataConfig) -> list[str]:
    """All problems of loading and of reading every sample; each is one line of bounded length."""
    with pytest.raises(InputError) as caught:
        data = load(config)
        for split in (data.train, data.eval):
            list(split if config.streaming else (split[index] for index in range(len(split))))
    problems = list(caught.value.problems)
    assert all("\n" not in problem and len(problem) < 700 for problem in problems), problems
    return problems


def boxes_folder(root: Path, objects: list[Any] | None = None, names: Any = None, **changes: Any) -> Path:
    """Four images of 40 x 30 a split with `objects` in metadata.jsonl, and labels.json."""
    given = objects or [{"bbox": [[2, 3, 10, 8]], "category": [0]}] * 4
    for seed, split in enumerate(("train", "val")):
        (root / split).mkdir(parents=True)
        lines = []
        for index, value in enumerate(given):
            picture(10 * seed + index, (40, 30)).save(root / split / f"{index}.png")
            line = {"file_name": f"{index}.png", "objects": value, **changes}
            lines.append({key: item for key, item in line.items() if item != "absent"})
        (root / split / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (root / "labels.json").write_text(json.dumps(names or {"id2label": NAMES}))
    return root


def coco_folder(root: Path, change: Callable[[dict[str, Any]], Any] = lambda content: None) -> Path:
    """The same with COCO json, whose training file `change` edits."""
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        picture(0, (40, 30)).save(root / split / "0.png")
        content = {
            "images": [{"id": 1, "file_name": "0.png"}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 5, 6]}],
            "categories": [{"id": 3, "name": "cat"}, {"id": 90, "name": "dog"}],
        }
        if split == "train":
            change(content)
        (root / "annotations").mkdir(exist_ok=True)
        (root / COCO.format(split=split)).write_text(json.dumps(content))
    return root
