"""Makes `import cankd_hf` enough for `AutoModel...from_pretrained`, without importing transformers itself.

The student classes need transformers, which takes seconds to import. So they are registered at once where its auto
classes are already there, and otherwise right after somebody imports them.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

TRIGGER = "transformers.models.auto.modeling_auto"


def _register() -> None:
    from cankd_hf.models import register

    register()


class _Finder(MetaPathFinder):
    """Waits for the auto classes' module, once, and registers when it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Registers the student classes now or as soon as they can be."""
    if TRIGGER in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Finder())
