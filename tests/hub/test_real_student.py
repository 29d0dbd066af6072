"""The student of a real run (docs/results.md, CamVid, seed 1, in half precision): it loads, it sees, its card runs."""

from __future__ import annotations

import contextlib
import io
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForSemanticSegmentation

import cankd_hf  # noqa: F401  (knows the model)
from cankd_hf.config import CanKDConfig
from cankd_hf.data.sources import DataConfig
from cankd_hf.tasks import SegmentationTask
from cankd_hf.trainer import CanKDTrainer

from .stand_in import problems

STUDENT = "tests/data/camvid_student"


def test_its_card_is_valid_and_the_code_in_it_runs(
    repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (repo_root / "model_cards" / "camvid_cankd.md").read_text()
    assert problems(card) == []
    Image.effect_noise((96, 72), 80).convert("RGB").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(repo_root)
    code = card.split("```python\n")[1].split("```")[0].replace("photo.jpg", str(tmp_path / "photo.jpg"))
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(code, {})
    assert "(96, 72)" in shown.getvalue()


def test_it_labels_real_images_as_its_card_says(repo_root: Path, shared_data: Path, tmp_path: Path) -> None:
    config = DataConfig(
        path=str(shared_data / "camvid"),
        test_split="test",
        image_size=[180, 240],
        max_eval_samples=24,
        check="none",
    )
    task, data = SegmentationTask.from_data(config, splits=("test",))
    model = AutoModelForSemanticSegmentation.from_pretrained(repo_root / STUDENT, dtype=torch.float32)
    assert list(model.config.id2label.values()) == list(task.id2label.values())
    args = CanKDConfig(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
    scores = CanKDTrainer(model, None, args, task=task, eval_dataset=data.test).evaluate()
    # The card has 0.81 over the whole split; these are its first images.
    assert math.isclose(scores["eval_pixel_accuracy"], 0.81, abs_tol=0.1), scores
