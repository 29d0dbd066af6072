"""What CONTRIBUTING says it takes to add something, done on a scratch copy of the package: so many files and no more.

A task is added in `test_toy_task.py`; a second teacher and a phase take no file: `training/test_objective.py`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.processes import forked

ROOT = Path(__file__).resolve().parents[1]
LOSS_ON_MAPS = '''"""L1 distance of two maps."""

from __future__ import annotations

from torch import Tensor

from cankd_hf.losses.base import FeatureLoss


class L1Loss(FeatureLoss):
    """Mean absolute difference."""

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss [] of two maps [B, C, H, W]."""
        return (student - teacher).abs().mean()
'''
LOSS_ON_LOGITS = '''"""KL divergence of two heads."""

from __future__ import annotations

from torch import Tensor

from cankd_hf.losses.base import LogitsLoss


class SoftLoss(LogitsLoss):
    """Mean over positions of KL(teacher, student).

    Args:
        num_labels: classes K of both heads.
        temperature: divides the logits.
    """

    def __init__(self, num_labels: int, temperature: float = 1.0) -> None:
        super().__init__(num_labels)
        self.temperature = temperature

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss [] of two logits."""
        dim = self.class_dim(student)
        ours, theirs = ((x / self.temperature).log_softmax(dim) for x in (student, teacher))
        return (theirs.exp() * (theirs - ours)).sum(dim).mean()
'''
AFFINITY = '''"""A dot product without negative values."""

from __future__ import annotations

from torch import Tensor

from cankd_hf.losses.affinities.base import Affinity, Block, Projections, keys_and_values, output_block


class PositiveProduct(Affinity):
    """`relu(<q_i, k_j>) / M`."""

    value_range = "non-negative"

    def published(self, p: Projections, query: Tensor, key: Tensor) -> Tensor:
        """The affinity [B, N, M]."""
        return (query.mT @ key).relu() / key.shape[2]

    def block(self, p: Projections, student: Tensor, teacher: Tensor, pool: bool) -> Block:
        """The same as published: a toy needs no fast form."""
        key, value = keys_and_values(p, teacher, pool)
        query = p.theta.flat(student.to(key.dtype))
        return output_block(p, self.published(p, query, key) @ value.mT)
'''
GAUSSIAN = "from cankd_hf.losses.affinities.gaussian import Gaussian\n"
# file -> content; file -> (line to add after, line)
NEW = {"losses/l1.py": LOSS_ON_MAPS, "losses/soft.py": LOSS_ON_LOGITS, "losses/affinities/positive.py": AFFINITY}
LINES = {
    "losses/__init__.py": [
        ("from cankd_hf.losses.cankd import CanKDLoss\n", "from cankd_hf.losses.soft import SoftLoss\n"),
        ("from cankd_hf.losses.cankd import CanKDLoss\n", "from cankd_hf.losses.l1 import L1Loss\n"),
        ('"cankd": CanKDLoss,', ' "l1": L1Loss, "soft": SoftLoss,'),
    ],
    "losses/affinities/__init__.py": [
        (GAUSSIAN, "from cankd_hf.losses.affinities.positive import PositiveProduct\n"),
        ('"dot_product": DotProduct(),', ' "positive": PositiveProduct(),'),
    ],
}
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
FPN = {"fpn_channels": 16, "head_channels": 16, "norm": "group"}
RECIPE = {
    "output_dir": "run",
    "data": {
        "path": "shapes",
        "generated": {"train": 8, "validation": 4, "test": 4, "size": 64},
        "crop_size": [64, 64],
    },
    "student": {"backbone": {**RESNET, "layer_type": "basic"}, "fpn": FPN},
    "teacher": {
        "config": {
            "model_type": "cankd_fpn",
            "backbone_config": {**RESNET, "layer_type": "basic"},
            "num_labels": 6,
            **FPN,
        }
    },
    "distill": {
        "terms": [
            {"loss": "l1", "weight": 1.0},
            {"loss": "soft", "weight": 1.0, "options": {"temperature": 2.0}},
            {"loss": "cankd", "options": {"affinity": "positive"}},
        ]
    },
    "training": {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "eval_strategy": "no",
        "use_cpu": True,
    },
}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with a loss on maps, a loss on logits and an affinity more."""
    folder = tmp_path_factory.mktemp("scratch")
    shutil.copytree(ROOT / "cankd_hf", folder / "cankd_hf", ignore=shutil.ignore_patterns("__pycache__"))
    for name, content in NEW.items():
        (folder / "cankd_hf" / name).write_text(content, encoding="utf-8")
    for name, additions in LINES.items():
        file = folder / "cankd_hf" / name
        text = file.read_text(encoding="utf-8")
        for after, line in additions:
            assert after in text, f"{name} has no line {after!r} any more"
            text = text.replace(after, after + line, 1)
        file.write_text(text, encoding="utf-8")
    return folder


def train(folder: Path, recipe: dict) -> subprocess.CompletedProcess[str]:
    """Runs the training command of the copy."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return forked(["-m", "cankd_hf.train", "recipe.yaml"], folder, {"PYTHONPATH": str(folder), "HOME": str(folder)})


def test_a_loss_on_maps_a_loss_on_logits_and_an_affinity_are_one_file_and_one_line_each(scratch: Path) -> None:
    done = train(scratch, RECIPE)
    assert done.returncode == 0, done.stderr[-3000:]
    history = json.loads((scratch / "run" / "trainer_state.json").read_text())["log_history"]
    assert {"loss_l1", "loss_soft", "loss_cankd"} <= history[0].keys()
    facts = json.loads((scratch / "run" / "distillation.json").read_text())
    assert [term["loss"] for term in facts["terms"]] == ["l1", "soft", "cankd"]


def test_what_was_added_is_checked_like_the_rest(scratch: Path) -> None:
    wrong = {**RECIPE, "distill": {"terms": [{"loss": "soft", "options": {"temprature": 2.0}}, {"loss": "l2"}]}}
    done = train(scratch, wrong)
    assert done.returncode == 2
    assert (
        "did you mean 'temperature'" in done.stderr and "expected one of cankd, l1, soft, instance_mse" in done.stderr
    )
