"""Makes `import cankd_hf` enough for `AutoModel...from_pretrained`, without importing transformers itself.

The student classes need transformers, which takes seconds to import. So they are registered at once where its auto
classes are already there, and otherwise right after somebody imports them.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

TRIGGER = "transformers.models.auto.modeling_auto"


def _register() -> None:
    from cankd_hf.models import register

    register()


class _RegisteringLoader(Loader):
    """Runs the module's own loader, then registers."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register()


class _Finder(MetaPathFinder):
    """Waits for the auto classes' module, once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


def install() -> None:
    """Registers the student classes now or as soon as they can be."""
    if TRIGGER in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Finder())
