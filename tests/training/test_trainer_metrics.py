"""Metrics of the user and ours, and predictions with and without labels."""

from __future__ import annotations

from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ConvNextBackbone

from cankd_hf.errors import InputError
from cankd_hf.tasks import FeaturesTask

from .beside_stock import Unlabelled, accuracy, images, stock, taught
from .detector_trainers import Boxed, detector_trainer
from .tiny_trainers import Images, student, trainer


def test_own_metrics_get_logits_and_labels_with_a_teacher_too(tmp_path: Path) -> None:
    given = {"eval_dataset": images(3), "compute_metrics": accuracy}
    control, made = stock(tmp_path / "stock", **given), taught(tmp_path / "ours", **given)
    theirs, own = control.evaluate(), made.evaluate()
    assert own["eval_checksum"] == theirs["eval_checksum"] and own["eval_accuracy"] == theirs["eval_accuracy"]
    assert not any("miou" in key for key in own)
    made.compute_metrics = lambda prediction: {"later": float(prediction.predictions.sum())}
    assert "eval_later" in made.evaluate()
    made.preprocess_logits_for_metrics = lambda logits, labels: logits.argmax(1)
    assert made.predict(images(3)).predictions.shape == (3, 8, 8)


def test_preprocessing_alone_leaves_the_loss_and_its_results_as_predictions(tmp_path: Path) -> None:
    for name, build in (("stock", stock), ("ours", taught)):
        made = build(
            tmp_path / name, preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(1), max_steps=2
        )
        scores = made.evaluate(images(3))
        assert "eval_loss" in scores and "eval_miou" not in scores
        found = made.predict(images(3))
        assert found.predictions.shape == (3, 8, 8) and "test_miou" not in found.metrics
    made.preprocess_logits_for_metrics = None
    assert "eval_miou" in made.evaluate(images(3))


@pytest.mark.parametrize("schedule", ["linear", "reduce_lr_on_plateau"])
def test_a_score_that_no_evaluation_has_is_told_with_the_nearest(schedule: str, tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 1, "lr_scheduler_type": schedule}
    made = taught(tmp_path, eval_dataset=images(2), metric_for_best_model="mIoU", **settings)
    with pytest.raises(InputError, match="training.metric_for_best_model: no evaluation has a score 'mIoU'; .*miou"):
        made.train()


def test_our_scores_do_not_depend_on_how_the_trainer_collects(tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"batch_eval_metrics": True, "include_for_metrics": ["inputs", "loss"]},
        {"eval_do_concat_batches": False, "eval_accumulation_steps": 1},
        {"eval_use_gather_object": True, "dataloader_drop_last": True},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    ]
    found = []
    for number, more in enumerate(settings):
        made = taught(tmp_path / str(number), eval_dataset=images(5), per_device_eval_batch_size=2, **more)
        scores = made.evaluate()
        found.append(
            {key: value for key, value in scores.items() if key.startswith(("eval_iou", "eval_miou", "eval_loss"))}
        )
        assert made.args.batch_eval_metrics == more.get("batch_eval_metrics", False)
    assert all(scores == found[0] for scores in found) and len(found[0]) == 6


def test_the_last_images_count_in_scores_with_drop_last(tmp_path: Path) -> None:
    seen: list[int] = []
    made = taught(tmp_path, dataloader_drop_last=True, per_device_eval_batch_size=2, per_device_train_batch_size=4)
    made.compute_metrics = lambda prediction: seen.append(len(prediction.predictions)) or {}
    made.evaluate(images(5))
    made.predict(images(3))
    assert seen == [5, 3] and len(made.get_train_dataloader()) == 1


def test_persistent_workers_evaluate_the_data_set_that_is_given(tmp_path: Path) -> None:
    settings = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    made = taught(tmp_path, eval_dataset=images(5), **settings)
    first, other = made.evaluate(), made.evaluate(Images(3, size=32, noisy=False))
    assert other["eval_loss"] != first["eval_loss"] and made.evaluate()["eval_loss"] == first["eval_loss"]
    made.train()
    assert not active_children(), "at exit torch waits for each of them where memory is pinned"


def test_predictions_of_images_without_labels(tmp_path: Path) -> None:
    made = taught(tmp_path)
    whole, bare = made.predict(images(3)), made.predict(Unlabelled(images(3)))
    assert np.array_equal(whole.predictions, bare.predictions) and bare.label_ids is None
    assert {"test_loss", "test_miou"} <= whole.metrics.keys() and not {"test_loss", "test_miou"} & bare.metrics.keys()
    with pytest.raises(InputError, match="eval_dataset.0.: expected the key 'labels'"):
        made.evaluate(Unlabelled(images(3)))
    with pytest.raises(InputError, match="eval_dataset: expected images with labels to score, got a batch without"):
        made.prediction_step(made.model, {"pixel_values": images(2).images}, False)


@pytest.mark.parametrize("kind", ["retinanet", "conditional_detr"])
def test_predictions_of_detectors_are_batches_and_labels_stay_with_their_image(kind: str, tmp_path: Path) -> None:
    made = detector_trainer(tmp_path, kind, per_device_eval_batch_size=2)
    found = made.predict(Boxed(3))
    assert [len(batch) for batch in found.label_ids] == [2, 1]
    counts = [len(label["class_labels"]) for batch in found.label_ids for label in batch]
    assert counts == [1, 2, 3] and "test_ap" in found.metrics
    assert made.evaluate(Boxed(3))["eval_ap"] == found.metrics["test_ap"]
    shapes = {part.shape for part in found.predictions[1] if isinstance(part, np.ndarray)}
    assert any(shape[0] == 1 and shape[-1] == 4 for shape in shapes)
    bare = made.predict(Unlabelled(Boxed(3)))
    assert bare.label_ids is None and "test_ap" not in bare.metrics
    made.compute_metrics = lambda prediction: {"images": sum(map(len, prediction.label_ids))}
    assert made.evaluate(Boxed(3))["eval_images"] == 3 and made.args.eval_do_concat_batches


def test_predictions_of_a_backbone_are_its_maps_with_the_scores_of_its_task(tmp_path: Path) -> None:
    model = ConvNextBackbone(student().config.backbone_config)
    made = trainer(tmp_path, Unlabelled(Images(8)), model=model, task_weight=0.0)
    assert isinstance(made.task, FeaturesTask)
    found = made.predict(Unlabelled(Images(3)))
    assert [len(part) for part in found.predictions] == [3] * 4 and found.label_ids is None
    assert made.evaluate(Unlabelled(Images(3)))["eval_cka"] == found.metrics["test_cka"]


class Sizes(Images):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        side = 64 if index < 2 else 32
        return {key: value[..., :side, :side] for key, value in super().__getitem__(index).items()}


def test_predictions_of_several_sizes_are_a_list_or_refused(tmp_path: Path) -> None:
    made = taught(tmp_path, per_device_eval_batch_size=2)
    assert made.evaluate(Sizes(4))["eval_miou"] > 0
    with pytest.raises(InputError, match="eval_do_concat_batches: .*images differ in size"):
        made.predict(Sizes(4))
    made.args.eval_do_concat_batches = False
    assert [batch.shape[-1] for batch in made.predict(Sizes(4)).predictions] == [16, 8]
