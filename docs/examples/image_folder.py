"""From a folder of images to a student in one call: the recipe of `cankd train`, as a dictionary of its keys."""

from pathlib import Path

import yaml

from cankd_hf import load_recipe, run

STEPS = 40

recipe = {
    "task": "segmentation",
    "output_dir": "runs/image_folder",
    "data": {
        "path": "shapes",  # your folder; `cankd data FOLDER` says what is in it
        "generated": {"train": 64, "validation": 8, "test": 8, "size": 64},
        "test_split": "test",
        "image_size": [64, 64],
    },
    "student": {
        "backbone": {"model_type": "timm_backbone", "backbone": "mobilenetv3_small_050"},
        "fpn": {"fpn_channels": 32, "head_channels": 32},
    },
    "teacher": {
        "config": {"model_type": "dinov2", "hidden_size": 48, "num_hidden_layers": 2}
    },  # model: facebook/dinov2-base
    "distill": {"terms": [{"loss": "cankd", "weight": 5, "warmup": 0.05}]},
    "training": {"max_steps": STEPS, "per_device_train_batch_size": 8, "learning_rate": 2e-3, "report_to": "none"},
}
Path("recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
report = run(load_recipe("recipe.yaml"))
print({arm.name: arm.scores for arm in report.arms})
