"""The public names: a change here is a change for every user, so it is made on purpose."""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings

import pytest

import cankd_hf
from cankd_hf._moved import MOVED

NAMES = """
CanKDConfig CanKDLoss CanKDTrainer Distiller FPNConfig FPNForObjectDetection FPNForSemanticSegmentation
FeatureFiguresCallback InputError InstanceMSELoss LossTerm Objective Phase TeacherOutput load_recipe load_teacher run
"""
PUBLIC = set(NAMES.split())
# Imports that people have in their scripts: module of 0.1 -> some of its names.
OLD_IMPORTS = {
    "checkpoint": ["Stopwatch", "SafeStop", "read_student_weights"],
    "config": ["CanKDConfig", "stepped_schedule"],
    "data.collate": ["detection_collate", "original_sizes", "segmentation_collate"],
    "data.config": ["DataConfig"],
    "data.dataset": ["ImageDataset", "Source"],
    "data.detection": ["DetectionData", "load_detection"],
    "data.folders": ["FolderSource"],
    "data.seeded": ["SeededDataset"],
    "data.shapes": ["SHAPE_CLASSES", "ShapesSource"],
    "data.sources": ["DataConfig", "ImageData", "load_images", "load_segmentation"],
    "data.transforms": ["EvalTransform", "Normalize", "TrainTransform"],
    "distiller": ["Distiller"],
    "evaluate": ["main"],
    "figures.attention": ["attention_maps"],
    "figures.signs": ["warning_signs"],
    "hub.mixin": ["PushesStudent"],
    "hub_config": ["HubConfig"],
    "inspect": ["dry_run"],
    "losses.affinity": ["AFFINITIES"],
    "losses.base": ["FeatureLoss", "LossTerm", "compute_dtype"],
    "losses.moments": ["instance_distance", "pair_moments"],
    "metrics.evaluate_adapter": ["SegmentationMetric"],
    "models.student_config": ["StudentConfig"],
    "monitoring.energy": ["EnergyMeter"],
    "push": ["main"],
    "recipe": ["DistillConfig", "Recipe", "load_data_config", "load_recipe", "parse_recipe", "recipe_to_yaml"],
    "report": ["print_report"],
    "runner": ["Arm", "Report", "Stopped", "build_student", "build_teacher", "build_trainer", "run", "training_args"],
    "tasks.detection_pictures": ["draw_detections"],
    "tasks.pictures": ["shown", "spread"],
    "teacher": ["Teacher", "TeacherConfig", "load_teacher"],
    "train": ["main", "parser"],
    "trainer": ["CanKDTrainer"],
}


def test_the_public_names_are_these() -> None:
    assert set(cankd_hf.__all__) == PUBLIC


def test_every_public_name_resolves_and_is_documented() -> None:
    for name in cankd_hf.__all__:
        assert inspect.getdoc(getattr(cankd_hf, name)), f"cankd_hf.{name} has no docstring"


@pytest.mark.parametrize("module", OLD_IMPORTS)
def test_imports_of_the_release_before_still_work(module: str) -> None:
    sys.modules.pop(f"cankd_hf.{module}", None) if module in MOVED else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = importlib.import_module(f"cankd_hf.{module}")
        assert all(getattr(found, name) is not None for name in OLD_IMPORTS[module])
    said = [str(warning.message) for warning in caught if issubclass(warning.category, DeprecationWarning)]
    assert any(text.startswith(f"cankd_hf.{module} has moved to cankd_hf.") for text in said) == (module in MOVED)


def test_a_name_that_left_its_module_says_where_it_is() -> None:
    with pytest.warns(DeprecationWarning, match="shown is now cankd_hf.tasks.pictures.denormalize"):
        assert importlib.import_module("cankd_hf.tasks.pictures").shown
    with pytest.warns(DeprecationWarning, match="LossTerm is now cankd_hf.config.distill.LossTerm"):
        assert importlib.import_module("cankd_hf.losses.base").LossTerm is cankd_hf.LossTerm
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = importlib.import_module("cankd_hf.losses.base").no_such_name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("module", MOVED)
def test_every_moved_module_names_modules_that_exist(module: str) -> None:
    for place in MOVED[module]:
        importlib.import_module(f"cankd_hf.{place}")
    with pytest.raises(AttributeError, match="its names are in cankd_hf."):
        _ = importlib.import_module(f"cankd_hf.{module}").no_such_name
