"""Reads classes, parameters and the keys of dictionaries from the source of modules, so that torch is not imported.

If a module is already imported, its objects are used instead: a task or a loss may have been added.
"""

import ast
import inspect
import sys
from functools import cache
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_origin, get_type_hints

from pydantic import BeforeValidator

_TYPES: dict[str, Any] = {kind.__name__: kind for kind in (bool, dict, float, int, list, str, tuple)}
_TYPES |= {"Sequence": list, "Union": Union}


def names(module: str, dictionary: str) -> list[str]:
    """The keys of a module-level dictionary; empty if there is no such module."""
    live = _live(module, dictionary)
    return list(live) if live is not None else list(_entries(module, dictionary))


def entry_parameters(module: str, dictionary: str, key: str) -> dict[str, Any]:
    """Names and types of the constructor arguments of a class in such a dictionary."""
    live = _live(module, dictionary)
    if live is None:
        return parameters(module, _entries(module, dictionary)[key])
    hints = get_type_hints(live[key].__init__, include_extras=True)
    return {name: hints.get(name, Any) for name in inspect.signature(live[key]).parameters}


@cache
def parameters(module: str, name: str) -> dict[str, Any]:
    """Names and types of the arguments of a class's constructor, its own or inherited.

    Args:
        module: the module that defines the class or imports it by `from ... import`.
        name: name of the class.
    """
    place, body, bases = _class(module, name)
    for item in body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            given = [*item.args.posonlyargs, *item.args.args, *item.args.kwonlyargs][1:]
            return {argument.arg: _type(argument.annotation, place) for argument in given}
    return next((found for base in bases if (found := parameters(place, base))), {})


@cache
def fields(module: str, name: str) -> dict[str, Any]:
    """Name and type of every public field of a dataclass, those of its bases first."""
    place, body, bases = _class(module, name)
    found: dict[str, Any] = {}
    for base in bases:
        found |= fields(place, base)
    for item in body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.target.id[0] != "_":
            found[item.target.id] = _type(item.annotation, place)
    return found


def _live(module: str, dictionary: str) -> dict[str, Any] | None:
    """The dictionary itself if the module is already imported, else None."""
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
def _tree(module: str) -> tuple[list[ast.stmt], str]:
    """The statements of a module (empty if there is no such module), and the package of its relative imports."""
    top, _, rest = module.partition(".")
    spec = find_spec(top)  # of the top-level package only: for a submodule, find_spec would import its parents
    if spec is None or spec.origin is None:
        return [], module
    base = Path(spec.origin).parent / rest.replace(".", "/")
    for file in (base / "__init__.py", base.with_suffix(".py")):
        if file.is_file():
            package = module if file.name == "__init__.py" else module.rpartition(".")[0]
            return ast.parse(file.read_text(encoding="utf-8")).body, package
    return [], module


@cache
def _find(module: str, name: str) -> tuple[str, ast.AST | None]:
    """The module that defines a module-level name, and its class definition or value."""
    body, package = _tree(module)
    for node in body:
        match node:
            case ast.ClassDef(name=found) if found == name:
                return module, node
            case ast.AnnAssign(target=ast.Name(id=found)) | ast.Assign(targets=[ast.Name(id=found)]) if found == name:
                return module, node.value
            case ast.ImportFrom(names=aliases):
                for alias in aliases:
                    if (alias.asname or alias.name) == name:
                        return _find(resolve_name("." * node.level + (node.module or ""), package), alias.name)
    return module, None


def _class(module: str, name: str) -> tuple[str, list[ast.stmt], list[str]]:
    """The module that defines a class, its statements and the names of its bases; empty if it is not a class."""
    place, node = _find(module, name)
    if not isinstance(node, ast.ClassDef):
        return place, [], []
    return place, node.body, [base.id for base in node.bases if isinstance(base, ast.Name)]


def _type(node: ast.expr | None, module: str) -> Any:
    """A type from its source; `Any` for classes that YAML cannot express; enumerations as their values."""
    match node:
        case ast.Constant(value=str(text)):
            return _type(ast.parse(text, mode="eval").body, module)
        case ast.Constant(value=None):
            return None
        case ast.BinOp(left=left, right=right):
            members = [_type(left, module), _type(right, module)]
            if any(get_origin(kind) is Annotated for kind in members):
                members = [kind for kind in members if kind is not str]  # `SchedulerType | str`: its values alone
            return Union[tuple(members)]  # noqa: UP007
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            return Literal[ast.literal_eval(inner)]
        case ast.Subscript(value=ast.Name(id=name), slice=inner) if name in _TYPES:
            items = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return _TYPES[name][tuple(_type(item, module) for item in items)]
        case ast.Name(id=name):
            return _TYPES.get(name) or _enumeration(*_class(module, name))
    return Any


def _enumeration(module: str, body: list[ast.stmt], bases: list[str]) -> Any:
    assigned = [item.value for item in body if isinstance(item, ast.Assign)]
    values = [value.value for value in assigned if isinstance(value, ast.Constant)]
    if not values or not any(base.endswith("Enum") for base in bases):
        return Any
    # YAML reads an unquoted `no` as false.
    no = BeforeValidator(lambda value: "no" if value is False and "no" in values else value)
    return Annotated[Literal[tuple(values)], no]
