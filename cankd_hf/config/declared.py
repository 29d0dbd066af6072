"""What modules declare (classes, parameters, names in a dictionary), read from their source: torch stays unimported.

Where a module is imported already, its objects are asked instead: they may have got a task or a loss since.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import sys
import typing
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_origin, get_type_hints

from pydantic import BeforeValidator

_TYPES: dict[str, Any] = {
    name: getattr(builtins, name) for name in ("bool", "dict", "float", "int", "list", "str", "tuple")
} | {"Sequence": list, "Literal": Literal, "Optional": typing.Optional, "Union": Union}


def names(module: str, dictionary: str) -> list[str]:
    """The keys of a dictionary at the top of a module; none if there is no such module."""
    live = _live(module, dictionary)
    return list(live) if live is not None else list(_entries(module, dictionary))


def entry_parameters(module: str, dictionary: str, key: str) -> dict[str, Any]:
    """Name and type of what the constructor of a class in such a dictionary takes."""
    live = _live(module, dictionary)
    if live is None:
        return parameters(module, _entries(module, dictionary)[key])
    hints = get_type_hints(live[key].__init__, include_extras=True)
    return {name: hints.get(name, Any) for name in inspect.signature(live[key]).parameters}


@cache
def parameters(module: str, name: str) -> dict[str, Any]:
    """Name and type of what the constructor of a class takes, its own or an inherited one.

    Args:
        module: that has the class or imports it by `from ... import`.
        name: of the class.
    """
    place, node = _find(module, name)
    if not isinstance(node, ast.ClassDef):
        return {}
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            given = [*item.args.posonlyargs, *item.args.args, *item.args.kwonlyargs][1:]
            return {argument.arg: _type(argument.annotation, place) for argument in given}
    found = (parameters(place, base.id) for base in node.bases if isinstance(base, ast.Name))
    return next((known for known in found if known), {})


@cache
def fields(module: str, name: str) -> dict[str, Any]:
    """Name and type of every public field of a dataclass, those of its bases first."""
    place, node = _find(module, name)
    found: dict[str, Any] = {}
    for base in node.bases if isinstance(node, ast.ClassDef) else ():
        found |= fields(place, base.id) if isinstance(base, ast.Name) else {}
    for item in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.target.id[0] != "_":
            found[item.target.id] = _type(item.annotation, place)
    return found


def _live(module: str, dictionary: str) -> dict[str, Any] | None:
    """The dictionary itself, where the module is imported (to its end)."""
    return vars(sys.modules[module]).get(dictionary) if module in sys.modules else None


def _entries(module: str, dictionary: str) -> dict[str, str]:
    """Key -> name of the object."""
    node = _find(module, dictionary)[1]
    if not isinstance(node, ast.Dict):
        return {}
    return {
        key.value: value.id if isinstance(value, ast.Name) else ""
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant) and isinstance(key.value, str)
    }


@cache
def _tree(module: str) -> tuple[list[ast.stmt], bool]:
    """The statements of a module, and whether it is a package; none if there is no such module."""
    top, _, rest = module.partition(".")
    spec = find_spec(top)  # finds a package without importing it, which holds for the outermost one only
    if spec is None or spec.origin is None:
        return [], False
    base = Path(spec.origin).parent / rest.replace(".", "/")
    for file in (base / "__init__.py", base.with_suffix(".py")):
        if file.is_file():
            return ast.parse(file.read_text(encoding="utf-8")).body, file.name == "__init__.py"
    return [], False


@cache
def _find(module: str, name: str) -> tuple[str, ast.AST | None]:
    """The class, or the value, that a name at the top of a module stands for, and the module that defines it."""
    body, package = _tree(module)
    for node in body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return module, node.value  # type: ignore[attr-defined]
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    parts = module.split(".")[: len(module.split(".")) + package - node.level] if node.level else []
                    return _find(".".join([*parts, *([node.module] if node.module else [])]), alias.name)
    return module, None


def _type(node: ast.expr | None, module: str) -> Any:
    """A type as it is written; `Any` for classes that a recipe cannot give. An enumeration stands for its values."""
    match node:
        case ast.Constant(value=str(text)):
            return _type(ast.parse(text, mode="eval").body, module)
        case ast.Constant(value=None):
            return None
        case ast.BinOp(left=left, right=right):
            members = [_type(left, module), _type(right, module)]
            if any(
                get_origin(kind) is Annotated for kind in members
            ):  # `SchedulerType | str`: its values and no others
                members = [kind for kind in members if kind is not str]
            return Union[tuple(members)]  # noqa: UP007
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            return Literal[ast.literal_eval(inner)]
        case ast.Subscript(value=ast.Name(id=name), slice=inner) if name in _TYPES:
            items = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return _TYPES[name][tuple(_type(item, module) for item in items)]
        case ast.Name(id=name):
            return _TYPES[name] if name in _TYPES else _enumeration(*_find(module, name))
    return Any


def _enumeration(module: str, node: ast.AST | None) -> Any:
    if not isinstance(node, ast.ClassDef) or not any(ast.unparse(base).endswith("Enum") for base in node.bases):
        return Any
    values = [
        item.value.value for item in node.body if isinstance(item, ast.Assign) and isinstance(item.value, ast.Constant)
    ]
    # YAML reads an unquoted `no` as false.
    return Annotated[
        Literal[tuple(values)], BeforeValidator(lambda value: "no" if value is False and "no" in values else value)
    ]
