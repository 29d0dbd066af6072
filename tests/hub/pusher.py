"""Run by test_push in a process whose Hub is the stand-in: trains tiny students and pushes them in every way."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import BitImageProcessor, ResNetBackbone, ResNetConfig, SegformerConfig, SegformerImageProcessor
from transformers import SegformerForSemanticSegmentation as Segformer

from cankd_hf import CanKDConfig, CanKDTrainer, evaluate, push, train
from cankd_hf.config.student import StudentConfig
from cankd_hf.hub import upload
from cankd_hf.tasks import DetectionTask
from tests.training.tiny_trainers import CLASSES, Images, terms, trainer

SIZE = {"height": 64, "width": 64}
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
RESNET["layer_type"] = "basic"
DETECTORS: dict[str, dict[str, Any]] = {
    "detector": {"backbone": RESNET, "fpn": {"head": "reppoints", "fpn_channels": 8, "score_threshold": 0.0}},
    "detr": {
        "config": {
            **{"model_type": "detr", "backbone_config": RESNET, "encoder_layers": 1, "decoder_layers": 1},
            **{"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_attention_heads": 2},
            **{"decoder_attention_heads": 2, "num_queries": 7},
        }
    },
}
RECIPE = yaml.safe_dump({"task": "segmentation", "data": {"path": "me/pictures", "crop_size": [64, 64]}})


def command(*words: str) -> tuple[int, str, str]:
    """The exit code of a push, and what it said."""
    return spoken(lambda: push.main(list(words)))


def spoken(call: Callable[[], int]) -> tuple[int, str, str]:
    """The exit code of a command, and what it said."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = call()
    return code, out.getvalue(), errors.getvalue()


def fpn(folder: Path, repo: str, strategy: str, steps: int = 1) -> Any:
    """A student pushed by its own training."""
    made = trainer(
        folder,
        eval_dataset=Images(4),
        processing_class=SegformerImageProcessor(size=SIZE),
        recipe=RECIPE,
        max_steps=steps,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        push_to_hub=True,
        hub_model_id=repo,
        hub_strategy=strategy,
        hub_always_push=True,
        hub_private_repo=True,
    )
    made.train()
    return made


def segformer(folder: Path) -> Any:
    config = SegformerConfig(
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
        num_labels=CLASSES,
    )
    made = trainer(folder, model=Segformer(config), max_steps=1)  # its image processor is the trainer's own
    made.train()
    made.save_model()
    return made


def backbone(folder: Path) -> Any:
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_indices=[1, 2]
    )
    processor = BitImageProcessor(do_resize=False, do_center_crop=False)
    made = trainer(
        folder,
        model=ResNetBackbone(config),
        task_weight=0.0,
        terms=terms(pairs=[[1, 0]]),
        processing_class=processor,
        max_steps=1,
    )
    made.train()
    made.save_model()
    return made


def detector(folder: Path, source: dict[str, Any]) -> Any:
    """A detector as its trainer saves it, without training."""
    task = DetectionTask({0: "red", 1: "blue"})
    student = task.build_student(StudentConfig(**source))
    made = CanKDTrainer(student, None, CanKDConfig(str(folder), use_cpu=True), task=task)
    made.save_model()
    return made


def whole_run(folder: Path) -> int:
    """A run of three arms from a recipe that asks for a push."""
    resnet = {**RESNET, "hidden_sizes": [8, 8], "depths": [1, 1]}
    generated = {"train": 8, "validation": 2, "test": 2, "size": 64}
    arguments = {"max_steps": 1, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True}
    pushing = {"id": "me/run", "license": "apache-2.0", "tags": ["shapes"]}
    recipe = {
        "output_dir": str(folder / "run"),
        "baseline": True,
        "data": {"path": "shapes", "generated": generated, "crop_size": [64, 64], "test_split": "test"},
        "student": {"backbone": resnet, "fpn": {"fpn_channels": 8, "head_channels": 8, "strides": [4, 8]}},
        "teacher": {
            "config": {
                "model_type": "cankd_fpn",
                "backbone_config": resnet,
                "fpn_channels": 16,
                "head_channels": 16,
                "strides": [4, 8],
            },
            "fit": {"max_steps": 1},
        },
        "training": arguments,
        "hub": pushing,
    }
    file = folder / "whole.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return train.main([str(file)])


@torch.no_grad()
def output(model: Any, images: torch.Tensor) -> torch.Tensor:
    found = model.eval()(pixel_values=images)
    return found.feature_maps[-1] if isinstance(model, ResNetBackbone) else found.logits


def main(root: Path) -> None:
    said, images, cases = {}, torch.randn(1, 3, 70, 50, generator=torch.Generator().manual_seed(3)), {}
    native = segformer(root / "segformer")
    said["broken"] = command(str(root / "segformer"), "me/segformer", "--public")
    said["repeated"] = command(str(root / "segformer"), "me/segformer", "--public")
    said["public"] = command(str(root / "segformer"), "me/segformer")
    said["branch"] = command(str(root / "segformer"), "me/segformer", "--public", "--revision", "first")
    bare = backbone(root / "backbone")
    said["private"] = command(str(root / "backbone"), "backbone")  # under one's own name
    made = fpn(root / "fpn", "me/fpn", "all_checkpoints", steps=2)
    made.push_to_hub(license="apache-2.0")
    detectors = {}
    for kind, source in DETECTORS.items():
        detectors[kind] = detector(root / kind, source)
        said[kind] = command(str(root / kind), f"me/{kind}")
    for strategy in ("end", "every_save", "checkpoint"):
        fpn(root / strategy, f"me/{strategy}", strategy)
    said["run"] = (whole_run(root), "", "")
    cases = {"fpn": made.student, "segformer": native.student, "backbone": bare.student}
    cases |= {kind: one.student for kind, one in detectors.items()}
    torch.save({k: (images, output(v.cpu(), images)) for k, v in cases.items()}, root / "cases.pt")
    folder = str(root / "segformer")
    said["foreign"] = command(folder, "somebody/new")
    said["taken"] = command(folder, "somebody/model", "--public")
    for case, repo in (("foreign run", "somebody/new"), ("taken run", "somebody/model")):
        words = [str(root / "whole.yaml"), f"output_dir={root / 'refused'}", f"hub.id={repo}"]
        said[case] = spoken(lambda words=words: train.main(words))
        assert not list((root / "refused").glob("**/*.safetensors")), "trained before it was refused"
    said["name"] = command(folder, "me/a name")
    token = os.environ.pop("HF_TOKEN")
    said["no token"] = command(folder, "me/other")
    for case, repo in (("scored nothing", "me/nothing"), ("scored private", "me/fpn"), ("scored name", "me/a b")):
        said[case] = spoken(lambda repo=repo: evaluate.main([repo, "data.path=shapes"]))
    os.environ["HF_TOKEN"] = "hf_" + "wrong" * 7
    said["wrong token"] = command(folder, "me/other")
    os.environ["HF_TOKEN"] = token
    upload._api.endpoint = "http://127.0.0.1:9"
    said["no network"] = command(folder, "me/other")
    (root / "said.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
