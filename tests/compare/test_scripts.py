"""The scripts beside the comparisons: splits that are cut, and a teacher of random weights."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, ViTImageProcessor

from tests.training.tiny_trainers import student

COMPARISONS = Path(__file__).resolve().parents[2] / "comparisons"


def script(name: str) -> dict[str, object]:
    return runpy.run_path(str(COMPARISONS / f"{name}.py"))


def test_an_untrained_teacher_is_its_teacher_with_other_weights(tmp_path: Path) -> None:
    teacher = student(seed=5)
    teacher.save_pretrained(tmp_path / "teacher")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "teacher")
    main = script("untrained_teacher")["main"]
    assert callable(main)
    for copy in ("a", "b"):
        main(tmp_path / "teacher", tmp_path / copy)
    made, again = (AutoModelForSemanticSegmentation.from_pretrained(tmp_path / copy) for copy in ("a", "b"))
    assert type(made) is type(teacher) and made.config.id2label == teacher.config.id2label
    theirs, ours, repeated = (dict(one.named_parameters()) for one in (teacher, made, again))
    assert theirs.keys() == ours.keys()
    weights = [name for name, value in theirs.items() if value.ndim == 4]
    assert not any(torch.equal(theirs[name], ours[name]) for name in weights)
    assert all(torch.equal(ours[name], repeated[name]) for name in ours)
    assert AutoImageProcessor.from_pretrained(tmp_path / "a").size == {"height": 32, "width": 32}
    with pytest.raises(SystemExit, match="nowhere: expected the folder of a trained teacher, got none"):
        main(tmp_path / "nowhere", tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_cut_splits_hold_the_chosen_images_with_their_labels(tmp_path: Path) -> None:
    train = tmp_path / "set" / "train"
    (train / "images").mkdir(parents=True)
    lines = []
    for index in range(5):
        Image.new("RGB", (4, 4), (index, 0, 0)).save(train / "images" / f"{index}.png")
        lines.append({"file_name": f"images/{index}.png", "objects": {"bbox": [], "category": []}})
    (train / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (tmp_path / "set" / "labels.json").write_text('{"num_labels": 1, "id2label": {"0": "cell"}}')
    main = script("cut_splits")["main"]
    assert callable(main)
    main(tmp_path / "set", tmp_path / "cut", ["train=train[::2]", "val=train[:1]"])
    found = [json.loads(line) for line in (tmp_path / "cut" / "train" / "metadata.jsonl").read_text().splitlines()]
    assert found == [lines[0], lines[2], lines[4]]
    assert sorted(path.name for path in (tmp_path / "cut" / "train" / "images").iterdir()) == [
        "0.png",
        "2.png",
        "4.png",
    ]
    assert (tmp_path / "cut" / "val" / "images" / "0.png").read_bytes() == (train / "images" / "0.png").read_bytes()
    assert (tmp_path / "cut" / "labels.json").is_file()
