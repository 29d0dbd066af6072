"""Where a record comes from: the code that made it, and the machine."""

import ast
import hashlib
import io
import platform
import tokenize
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
        found.update(f"{place.as_posix()}\n{_bare(path.read_text(encoding='utf-8'))}\n".encode())
    return found.hexdigest()[:16]


def _bare(text: str) -> str:
    """Code without its comments and docstrings, as it is written: what `ast.unparse` and `ast.dump` make of a tree
    differs between versions of Python, and so would the same code on two machines."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    todo: list[ast.AST] = [ast.parse(text)]
    while todo:
        body = getattr(todo.pop(), "body", None)
        if not isinstance(body, list):
            continue
        todo += body
        first = body[0] if body else None
        if (
            isinstance(first, ast.Expr)
            and isinstance(first.value, ast.Constant)
            and isinstance(first.value.value, str)
        ):
            start, end = first.lineno - 1, first.end_lineno or first.lineno
            lines[start:end] = [""] * (end - start)
    return "\n".join(kept for line in lines if (kept := line.rstrip()))


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
