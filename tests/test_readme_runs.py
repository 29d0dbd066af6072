"""The commands of the README, from the first to the last, run in a folder of their own; only their size is changed."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cankd_hf.__main__ import main
from cankd_hf.data.generated import SHAPE_CLASSES, ShapesSource

from .test_recipes_run import small

ROOT = Path(__file__).parents[1]
COMMAND = re.compile(r"^(?:cankd |accelerate launch -m cankd_hf\.)(\w+) ([^\n#]+)", re.MULTILINE)
TINY = [
    "training.max_steps=2",
    "training.per_device_train_batch_size=2",
    "training.use_cpu=true",
    "training.disable_tqdm=true",
]
SHAPES = ["data.generated={train: 8, validation: 2, test: 2, size: 64}", "teacher.fit={max_steps: 2}"]
BACKBONE = [
    "student.backbone={model_type: resnet, embedding_size: 8, hidden_sizes: [8, 8, 16, 16], depths: [1, 1, 1, 1], "
    "layer_type: basic}"
]
CROPS = ["data.image_size=[64,64]", "data.crop_size=[64,64]", "training.bf16=false"]


def write_folder(folder: Path) -> Path:
    """A segmentation set as README's /data/camvid, of generated images."""
    for split, count in (("train", 6), ("val", 2), ("test", 2)):
        source, lines = ShapesSource({"val": "validation"}.get(split, split), count, pixels=64), []
        (folder / split).mkdir(parents=True)
        for index in range(count):
            sample = source.load(index)
            Image.fromarray(sample.image.permute(1, 2, 0).numpy()).save(folder / split / f"{index}.png")
            Image.fromarray(np.asarray(sample.label, dtype=np.uint8)).save(folder / split / f"{index}_mask.png")
            lines.append(json.dumps({"file_name": f"{index}.png", "mask_file_name": f"{index}_mask.png"}))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines))
    (folder / "labels.json").write_text(json.dumps({"id2label": SHAPE_CLASSES}))
    return folder


def changes(module: str, words: list[str], folder: Path) -> list[str]:
    """What makes a command small, and free of downloads."""
    if module == "export":
        return ["--no-latency", "--size", "64", "64"]
    if module == "visualize":
        return ["--count", "1"]
    if module != "train":
        return []
    if words[0] == "quickstart":
        return TINY + SHAPES
    if words[0] == "camvid_lite2_teacher":  # its pretrained weights are on the Hub
        return [*TINY, *CROPS, *BACKBONE]
    if words[0] == "dinov2_seg":
        return small(ROOT / "recipes/dinov2_seg.yaml", folder / "dinov2")
    return TINY + CROPS


def test_every_command_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    camvid = str(write_folder(tmp_path / "camvid"))
    commands = COMMAND.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {module for module, _ in commands} >= {"train", "evaluate", "visualize", "push", "export"}
    for module, text in commands:
        words = shlex.split(text.replace("/data/camvid", camvid))
        assert main([module, *words, *changes(module, words, tmp_path)]) == 0, f"{module} {text}"
    for file in ("predictions.png", "README.md", "visualize/report.html"):
        assert (tmp_path / "runs/quickstart" / file).stat().st_size > 1000, file
