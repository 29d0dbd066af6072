"""Students of real runs (docs/results.md, in half precision): they load, they see, their cards run."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import cankd_hf  # noqa: F401  (knows the models)
from cankd_hf.config.data import DataConfig
from cankd_hf.tasks import DetectionTask, SegmentationTask
from cankd_hf.training.arguments import CanKDConfig
from cankd_hf.training.trainer import CanKDTrainer

from .stand_in import problems

# Name of the data -> task, image size, score and its value on the first images of the test split as of our runs.
STUDENTS: dict[str, tuple[Any, list[int], str, float]] = {
    "camvid": (SegmentationTask, [180, 240], "pixel_accuracy", 0.81),
    "bccd": (DetectionTask, [240, 320], "ap50", 0.83),
}


@pytest.mark.parametrize("name", STUDENTS)
def test_its_card_is_valid_and_the_code_in_it_runs(
    name: str, repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (repo_root / "model_cards" / f"{name}_cankd.md").read_text()
    assert problems(card) == []
    Image.effect_noise((96, 72), 80).convert("RGB").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(repo_root)
    code = card.split("```python\n")[1].split("```")[0].replace("photo.jpg", str(tmp_path / "photo.jpg"))
    shown, names = io.StringIO(), {}
    with contextlib.redirect_stdout(shown):
        exec(code, names)
    labels = names["predict"].model.config.id2label
    assert len(labels) == {"camvid": 11, "bccd": 3}[name]
    assert name != "camvid" or "(96, 72)" in shown.getvalue()  # noise holds no cell


@pytest.mark.parametrize("name", STUDENTS)
def test_it_does_on_real_images_as_its_card_says(
    name: str, repo_root: Path, shared_data: Path, tmp_path: Path
) -> None:
    task_class, size, score, value = STUDENTS[name]
    config = DataConfig(
        path=str(shared_data / name), test_split="test", image_size=size, max_eval_samples=24, check="none"
    )
    task, data = task_class.from_data(config, splits=("test",))
    model = task.load(repo_root / f"tests/data/{name}_student")
    assert list(model.config.id2label.values()) == list(task.id2label.values())
    assert next(model.parameters()).dtype == torch.float32
    args = CanKDConfig(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
    scores = CanKDTrainer(model, None, args, task=task, eval_dataset=data.test).evaluate()
    # The card has the whole split; these are its first images.
    assert scores[f"eval_{score}"] == pytest.approx(value, abs=0.1), scores
