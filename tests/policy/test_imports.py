"""What training imports: no package that it may not need, beyond what the stock Trainer brings."""

from __future__ import annotations

import subprocess
import sys

from .sources import ROOT

# Packages that are ours or small.
LIGHT = {
    "cankd_hf",
    "annotated_types",
    "antlr4",
    "omegaconf",
    "psutil",
    "pydantic",
    "pydantic_core",
    "pygments",
    "rich",
}
LIGHT |= {"markdown_it", "mdurl", "typing_inspection", "yaml", "_yaml"}
CODE = """
import sys
import torchvision.transforms.v2, transformers
from transformers import AutoBackbone, Trainer, TrainingArguments
before = {name.partition(".")[0] for name in sys.modules}
from cankd_hf import CanKDTrainer, load_recipe
import cankd_hf.cli.report, cankd_hf.cli.train, cankd_hf.runs.run, cankd_hf.runs.threads
recipe = load_recipe("recipes/quickstart.yaml", to_run=True)
from cankd_hf.tasks import TASKS
TASKS[recipe.task].from_data(recipe.data, splits=("eval",))
now = {name.partition(".")[0] for name in sys.modules}
print(*sorted(now - before - sys.stdlib_module_names))
"""


def test_training_imports_little_more_than_the_stock_trainer() -> None:
    """timm, matplotlib, evaluate, faster_coco_eval, ... each cost tenths of seconds: where they are used."""
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {name for name in done.stdout.split() if not name.startswith("_")} - LIGHT
    assert not heavy, f"import these inside the functions that need them: {sorted(heavy)}"
