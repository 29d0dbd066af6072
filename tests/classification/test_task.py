"""Classification goes through every command; any classifier is a student, and a teacher of maps and logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForImageClassification, PreTrainedModel, ViTImageProcessor, pipeline

from cankd_hf import CanKDConfig, CanKDTrainer, LossTerm, evaluate, export, train
from cankd_hf.config.data import DataConfig
from cankd_hf.config.student import StudentConfig
from cankd_hf.errors import InputError
from cankd_hf.label.teacher import open_teacher
from cankd_hf.tasks import TASKS, ClassificationTask, saved_task, task_for
from cankd_hf.tasks.panels import panels
from cankd_hf.teachers.load import load_teacher
from tests.processes import forked

RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
RESNET["layer_type"] = "basic"
STAGED = {**RESNET, "out_indices": [2, 4]}
PLAIN = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
VIT = {**PLAIN, "intermediate_size": 32}
STAGES = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
HEADS = {"num_attention_heads": [1, 1, 2, 2]}
FAMILIES: dict[str, dict[str, Any]] = {
    "resnet": RESNET,
    "convnext": {"model_type": "convnext", **STAGES},
    "vit": {"model_type": "vit", "patch_size": 8, **VIT},
    "deit": {"model_type": "deit", "patch_size": 8, **VIT},
    "dinov2": {"model_type": "dinov2", "patch_size": 8, **PLAIN, "mlp_ratio": 2},
    "swin": {
        "model_type": "swin",
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "window_size": 4,
        "image_size": 32,
    },
    "pvt_v2": {"model_type": "pvt_v2", **STAGES, **HEADS},
    "segformer": {"model_type": "segformer", **STAGES, **HEADS},
    "mobilenet_v2": {"model_type": "mobilenet_v2", "depth_multiplier": 0.1, "min_depth": 4},
    "mobilevit": {"model_type": "mobilevit", "hidden_sizes": [8, 8, 16], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16]},
    "efficientnet": {
        "model_type": "efficientnet",
        "width_coefficient": 0.1,
        "depth_coefficient": 0.1,
        "hidden_dim": 128,
    },
    "regnet": {"model_type": "regnet", "embedding_size": 8, **STAGES, "groups_width": 4},
    "timm_wrapper": {"model_type": "timm_wrapper", "architecture": "test_resnet"},
}
NAMES = {0: "disc", 1: "ring", 2: "square", 3: "triangle", 4: "star"}
KINDS: dict[str, dict[str, Any]] = {
    "ours": {"backbone": RESNET},
    "ours_timm": {"backbone": {"model_type": "timm_backbone", "backbone": "test_resnet"}},
    **{name: {"config": config} for name, config in FAMILIES.items()},
}


def student(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return ClassificationTask(NAMES).build_student(StudentConfig(**KINDS[kind]))


FEW = ["ours", "ours_timm", "resnet", "vit", "timm_wrapper"]


def some(kinds: Any) -> Any:
    """The first few in each run, all in a slow one."""
    return pytest.mark.parametrize("kind", [k if k in FEW else pytest.param(k, marks=pytest.mark.slow) for k in kinds])


@some(KINDS)
def test_a_student_learns_and_loads_again(kind: str, tmp_path: Path) -> None:
    model, images = student(kind), torch.randn(2, 3, 32, 32)
    found = model(pixel_values=images, labels=torch.tensor([4, 1]))
    found.loss.backward()
    assert torch.isfinite(found.loss) and found.logits.shape == (2, 5)
    model.eval().save_pretrained(tmp_path)
    assert saved_task(str(tmp_path)) is ClassificationTask
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(again.eval()(pixel_values=images).logits, model(pixel_values=images).logits)
    assert task_for(again).id2label == NAMES


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_step_with_losses_on_maps_and_logits(kind: str, tmp_path: Path) -> None:
    """Every family teaches ours, and learns from it."""
    samples = [{"pixel_values": torch.randn(3, 32, 32), "labels": torch.tensor(n % 5)} for n in range(4)]
    terms = [LossTerm("cankd", weight=0.1), LossTerm("kl"), LossTerm("dist"), LossTerm("dkd")]
    for name, of in ((kind, "ours"), ("ours", kind)):
        args = CanKDConfig(
            str(tmp_path / name), max_steps=1, per_device_train_batch_size=4, use_cpu=True, report_to="none"
        )
        trainer = CanKDTrainer(
            student(name), student(of), args, terms=terms, train_dataset=samples, eval_dataset=samples
        )
        assert trainer.train().training_loss > 0
        assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1


def test_a_checkpoint_is_a_teacher_with_its_head_for_this_task_alone(tmp_path: Path) -> None:
    student("resnet").save_pretrained(tmp_path)
    plain, whole = load_teacher(str(tmp_path)), load_teacher(str(tmp_path), head=ClassificationTask.teacher_head)
    assert plain.logits_shape((32, 32)) is None and whole.logits_shape((32, 32)) == (1, 5)
    assert [level.stride for level in whole.levels((64, 64))] == [level.stride for level in plain.levels((64, 64))]
    staged = load_teacher(str(tmp_path), head=ClassificationTask.teacher_head, taps=["stage3"])
    assert [level.stride for level in staged.levels((64, 64))] == [16]


def test_images_without_a_class_count_for_nothing() -> None:
    task = ClassificationTask(NAMES)
    labels, factor = task.counted_labels(torch.tensor([-100, -100]))
    assert labels.tolist() == [0, -100] and factor == 0
    labels, factor = task.counted_labels(torch.tensor([-100, 2]))
    assert labels.tolist() == [-100, 2] and factor == 1
    for wrong in (torch.tensor(5), torch.tensor([1, 2]), "cat", torch.tensor(1.5)):
        assert task.label_problem(wrong, (4, 4), False)
    assert task.label_problem(torch.tensor(4), (4, 4), False) is None
    with pytest.raises(InputError, match="expected at least 2 classes, got 1"):
        ClassificationTask({0: "all"}).build_student(StudentConfig(**KINDS["ours"]))


DATA = {
    **{"path": "shapes", "generated": {"train": 16, "validation": 4, "test": 8, "size": 32}, "test_split": "test"},
    "image_size": [32, 32],
}


def test_the_class_of_an_image_stands_below_its_label() -> None:
    sample = {"pixel_values": torch.zeros(3, 8, 8), "labels": torch.tensor(1)}
    assert panels(ClassificationTask({0: "disc", 1: "ring"}), sample, {}, DataConfig()).captions == ["", "ring"]


def recipe(folder: Path, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "task": "classification",
        "output_dir": str(folder / "run"),
        "data": DATA,
        "student": {"backbone": STAGED},
        "teacher": {"config": {"model_type": "cankd_fpn", "head": "linear", "backbone_config": RESNET}},
        "distill": {"terms": [{"loss": "cankd", "weight": 0.1}, {"loss": "kl"}]},
        "training": {
            **{"max_steps": 3, "per_device_train_batch_size": 4, "eval_strategy": "steps", "eval_steps": 1},
            **{"save_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "accuracy"},
            **{"use_cpu": True, "disable_tqdm": True, "logging_steps": 1},
        },
        **changes,
    }
    file = folder / "classification.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run; the teacher has random weights, and gives logits too."""
    folder = tmp_path_factory.mktemp("classification")
    teacher = {"config": {"model_type": "cankd_fpn", "head": "linear", "backbone_config": STAGED, "num_labels": 5}}
    assert train.main([str(recipe(folder, teacher=teacher))]) == 0
    return folder / "run"


def test_a_run_ends_with_scores_pictures_and_a_card(finished: Path, tmp_path: Path) -> None:
    scores = json.loads((finished / "results.json").read_text())["arms"][-1]["scores"]
    assert {"accuracy", "top5_accuracy", "mean_accuracy", "accuracy_disc"} <= set(scores)
    with Image.open(finished / "predictions.png") as picture:
        assert picture.size[0] > 300
    assert "triangle" in (finished / "report.html").read_text()
    card = (finished / "README.md").read_text()
    for words in ("one of 5 classes", "pipeline_tag: image-classification", "type: accuracy", "It knows 5 classes"):
        assert words in card, card
    logged = json.loads((finished / "trainer_state.json").read_text())["log_history"]
    assert logged[0]["loss_cankd"] > 0 and logged[0]["loss_kl"] > 0 and logged[0]["loss_task"] > 0
    assert evaluate.main([str(finished), "--json", str(tmp_path / "scores.json")]) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["accuracy"] == pytest.approx(scores["accuracy"])
    with pytest.raises(InputError, match="outputs are labels, got one of classification"):
        open_teacher(str(finished), None, None, None)


@pytest.mark.slow
def test_onnx_gives_what_pytorch_gives(finished: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    assert export.main([str(finished), "--size", "64", "96", "--no-latency", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "export.json").read_text())
    assert report["outputs"] == ["logits"] and report["classes"] == list(NAMES.values())
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    images = torch.randn(3, 3, 72, 56)
    with torch.no_grad():
        wanted = TASKS["classification"].load(finished)(pixel_values=images).logits
    np.testing.assert_allclose(session.run(None, {"pixel_values": images.numpy()})[0], wanted.numpy(), atol=1e-4)


WITHOUT = """
import sys, torch
sys.modules["cankd_hf"] = None
from PIL import Image
from transformers import pipeline
found = pipeline("image-classification", "student", trust_remote_code=True)(Image.new("RGB", (50, 40), "red"))
torch.save([one["label"] for one in found], "found.pt")
"""


@pytest.mark.slow
def test_a_pipeline_with_and_without_cankd_hf(tmp_path: Path) -> None:
    student("ours").eval().save_pretrained(tmp_path / "student")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "student")
    ours = pipeline("image-classification", str(tmp_path / "student"))(Image.new("RGB", (50, 40), "red"))
    assert forked(["-c", WITHOUT], cwd=tmp_path).returncode == 0
    assert torch.load(tmp_path / "found.pt") == [one["label"] for one in ours]


@pytest.mark.slow
def test_eight_images_are_learned_by_heart(tmp_path: Path) -> None:
    data = {
        **DATA,
        "generated": {"train": 8, "validation": 8, "test": 8, "size": 32},
        "scale": [1.0, 1.0],
        "flip": 0.0,
    }
    data |= {"eval_split": "train", "test_split": "train"}
    training = {"max_steps": 80, "learning_rate": 0.01, "per_device_train_batch_size": 8, "use_cpu": True}
    changes = {"data": data, "teacher": None, "distill": {}, "training": {**training, "eval_strategy": "no"}}
    assert train.main([str(recipe(tmp_path, **changes))]) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["arms"][-1]["scores"]["accuracy"] == 1.0
