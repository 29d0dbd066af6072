"""Where a record comes from: the code that made it, and the machine."""

import ast
import hashlib
import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path

# Rooms that look at a run from outside: nothing in them changes a score or a cost.
_OUTSIDE = {"benchmark", "cli", "compare", "export", "figures", "hub", "visualize"}


@cache
def code_hash() -> str:
    """A digest of the code that decides what a run does, as it was at the start; comments and docstrings do not
    count."""
    return code_now()


def code_now(package: Path = Path(__file__).parents[1]) -> str:
    """The same of the code as it is now."""
    found = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package)
        if place.parts[0] in _OUTSIDE:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        found.update(f"{place.as_posix()}\n{ast.unparse(tree)}\n".encode())
    return found.hexdigest()[:16]


def machine() -> dict[str, str]:
    """What costs were measured on, and with which libraries."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {"device": device, "torch": version("torch"), "transformers": version("transformers")}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(named), "") or platform.processor() or platform.machine()
