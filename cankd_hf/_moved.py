"""Modules of cankd_hf 0.1 under their old names: they import with a `DeprecationWarning`, until 0.3."""

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Old module -> the modules that hold its names now.
MOVED: dict[str, tuple[str, ...]] = {
    **{f"data.{name}": (f"data.common.{name}",) for name in ("checks", "dataset", "decode", "folders", "labels")},
    **{f"data.{name}": (f"data.common.{name}",) for name in ("streams", "tables")},
    **{f"losses.{name}": (f"losses.kernels.{name}",) for name in ("blocks", "moments", "output_norm")},
    **{f"losses.{name}": (f"losses.kernels.{name}",) for name in ("prefix_sums", "projection")},
    **{f"monitoring.{x}": (f"training.monitoring.{x}",) for x in ("energy", "interval", "progress", "trackers")},
    "checkpoint": ("training.checkpoint", "training.callbacks"),
    "data.coco": ("data.detection.coco",),
    "data.collate": ("data.segmentation.collate", "data.detection.collate"),
    "data.config": ("config.data",),
    "data.detection_transforms": ("data.detection.transforms",),
    "data.objects": ("data.detection.objects",),
    "data.seeded": ("data.common.views",),
    "data.shapes": ("data.generated",),
    "data.sources": ("data.common.sources", "data.segmentation.load", "data.features.load", "config.data"),
    "data.transforms": ("data.segmentation.transforms", "data.common.transforms"),
    "distiller": ("training.distiller",),
    "export.detectors": ("models.plain_detectors",),
    "figures.attention": ("figures.draw",),
    "figures.signs": ("figures.curves",),
    "hub.mixin": ("training.hub_mixin",),
    "hub_config": ("config.hub",),
    "inspect": ("cli.dry_run",),
    "launch": ("runs.launch",),
    "losses.affinity": ("losses.affinities",),
    "metrics.evaluate_adapter": ("metrics.evaluate_segmentation",),
    "models.box_count": ("models.detr_num_boxes",),
    "models.student_config": ("config.student",),
    "monitoring": ("training.monitoring",),
    "recipe": ("config.recipe", "config.reading", "config.distill", "runs.recipe"),
    "recipe_checks": ("config.training", "runs.checks"),
    "report": ("cli.report",),
    "runner": ("runs.run", "runs.build", "runs.folder", "runs.record"),
    "schema": ("config.schema", "config.advice"),
    "tasks.detection_pictures": ("tasks.detection_outputs", "tasks.detection"),
    "teacher": ("teachers.teacher", "teachers.load", "config.teacher"),
    "trainer": ("training.trainer",),
    "visualize.report": ("visualize.session",),
    "yaml_source": ("config.yaml_source",),
}
# Old name -> the name now.
RENAMED = {
    "ImageData": "TaskData",
    "PushesStudent": "StudentHubMixin",
    "SafeStop": "GracefulStopCallback",
    "count_boxes_once": "patch_detr_num_boxes",
    "shown": "denormalize",
    "spread": "sample_evenly",
}


class _Finder(MetaPathFinder, Loader):
    """Comes after the finders of files, so that it is asked only for names that no file has."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        old = fullname.removeprefix("cankd_hf.")
        if old == fullname or old not in MOVED:
            return None
        return ModuleSpec(fullname, self, is_package=any(name.startswith(f"{old}.") for name in MOVED))

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        places = [f"cankd_hf.{place}" for place in MOVED[old.removeprefix("cankd_hf.")]]
        warnings.warn(f"{old} has moved to {' and '.join(places)}", DeprecationWarning, stacklevel=2)

        def find(name: str) -> Any:
            for place in places:
                found = import_module(place)
                if hasattr(found, RENAMED.get(name, name)):
                    return getattr(found, RENAMED.get(name, name))
            raise AttributeError(f"module {old!r} has no attribute {name!r}; its names are in {' and '.join(places)}")

        vars(module)["__getattr__"] = find


def left(module: str, place: str, *names: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module that is still there, for names that have left it for `place` or a new name."""

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(f"{name} is now cankd_hf.{place}.{RENAMED.get(name, name)}", DeprecationWarning, stacklevel=2)
        return getattr(import_module(f"cankd_hf.{place}"), RENAMED.get(name, name))

    return find


def install() -> None:
    """Makes the old names importable."""
    sys.meta_path.append(_Finder())
