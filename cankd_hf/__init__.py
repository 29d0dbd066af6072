"""Distil strong vision models into small dense-prediction students (CanKD, WACV 2026).

Importing this package is fast and makes its students loadable with `AutoModelFor...from_pretrained`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cankd_hf import _autoregister, _moved

__version__ = "0.1.0"

# Public name -> module that holds it, imported when first asked for.
_PUBLIC = {
    "CanKDConfig": "cankd_hf.training.arguments",
    "CanKDLoss": "cankd_hf.losses",
    "CanKDTrainer": "cankd_hf.training.trainer",
    "Distiller": "cankd_hf.training.distiller",
    "FPNConfig": "cankd_hf.models.fpn.configuration_cankd_fpn",
    "FPNForObjectDetection": "cankd_hf.models.fpn.modeling_cankd_fpn_detection",
    "FPNForSemanticSegmentation": "cankd_hf.models.fpn.modeling_cankd_fpn",
    "FeatureFiguresCallback": "cankd_hf.figures.callback",
    "InputError": "cankd_hf.errors",
    "InstanceMSELoss": "cankd_hf.losses",
    "LossTerm": "cankd_hf.config.distill",
    "Objective": "cankd_hf.training.objective",
    "Phase": "cankd_hf.config.phases",
    "TeacherOutput": "cankd_hf.teachers.teacher",
    "load_recipe": "cankd_hf.runs.recipe",
    "load_teacher": "cankd_hf.teachers.load",
    "run": "cankd_hf.runs.run",
}

if TYPE_CHECKING:
    from cankd_hf.config.distill import LossTerm
    from cankd_hf.config.phases import Phase
    from cankd_hf.errors import InputError
    from cankd_hf.figures.callback import FeatureFiguresCallback
    from cankd_hf.losses import CanKDLoss, InstanceMSELoss
    from cankd_hf.models.fpn.configuration_cankd_fpn import FPNConfig
    from cankd_hf.models.fpn.modeling_cankd_fpn import FPNForSemanticSegmentation
    from cankd_hf.models.fpn.modeling_cankd_fpn_detection import FPNForObjectDetection
    from cankd_hf.runs.recipe import load_recipe
    from cankd_hf.runs.run import run
    from cankd_hf.teachers.load import load_teacher
    from cankd_hf.teachers.teacher import TeacherOutput
    from cankd_hf.training.arguments import CanKDConfig
    from cankd_hf.training.distiller import Distiller
    from cankd_hf.training.objective import Objective
    from cankd_hf.training.trainer import CanKDTrainer

__all__ = [
    "CanKDConfig",
    "CanKDLoss",
    "CanKDTrainer",
    "Distiller",
    "FPNConfig",
    "FPNForObjectDetection",
    "FPNForSemanticSegmentation",
    "FeatureFiguresCallback",
    "InputError",
    "InstanceMSELoss",
    "LossTerm",
    "Objective",
    "Phase",
    "TeacherOutput",
    "load_recipe",
    "load_teacher",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


_autoregister.install()
_moved.install()
