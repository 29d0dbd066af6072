"""Writes a teacher like another one, with random weights: the control for what a teacher knows.

    python comparisons/untrained_teacher.py runs/camvid_46_teacher runs/camvid_46_untrained

A comparison with a `verdict:` makes this control by itself; one without names the folder as `teacher.model` of an arm.
"""

import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForSemanticSegmentation

import cankd_hf  # noqa: F401  registers the pyramids' classes


def main(source: Path, target: Path, seed: int = 0) -> None:
    """Builds the model of the config with random weights of a seed, beside a copy of its image processor."""
    if not (source / "config.json").is_file():
        raise SystemExit(f"{source}: expected the folder of a trained teacher, got none; train it first")
    torch.manual_seed(seed)
    AutoModelForSemanticSegmentation.from_config(AutoConfig.from_pretrained(source)).save_pretrained(target)
    shutil.copyfile(source / "preprocessor_config.json", target / "preprocessor_config.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
