"""YAML text and `a.b=value` overrides -> plain data that remembers where each value was written; runs no code."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cankd_hf.config.schema import Reader
from cankd_hf.errors import InputError


class YamlSource:
    """A YAML document with overrides applied.

    Numbers such as `5e-4` are numbers. `${section.key}` is followed; resolvers (`${oc.env:...}`, which would write
    secrets into saved files) and YAML tags are refused.

    Args:
        text: the document.
        overrides: `section.key=value`; items of a list by number.
        name: what messages call the document, usually its file name.

    Raises:
        InputError: if it is not valid YAML, or no mapping.
    """

    def __init__(self, text: str, overrides: Sequence[str], name: str) -> None:
        self.name = name
        self._lines = _lines(text, name)
        self._data = _parse(text, name)
        self._changed: set[str] = set()
        self._problems = [problem for override in overrides if (problem := self._override(override))]

    def place(self, path: str) -> str:
        """A dotted path with the file and line, or the command line, where it was set."""
        if any(path == key or path.startswith(key + ".") for key in self._changed):
            return f"{path} (command line)"
        if path not in self._lines and any(key.startswith(path + ".") for key in self._changed):
            return f"{path} (command line)"
        known = path
        while known and known not in self._lines:
            known = known.rpartition(".")[0]
        return f"{path} ({self.name}:{self._lines[known]})" if known else f"{path} ({self.name})"

    def read(self, reader: Reader) -> dict[str, Any]:
        """The data with references followed; notes in `reader` what was wrong with the overrides.

        Raises:
            InputError: if a reference cannot be followed or calls a resolver.
        """
        reader.problems += self._problems
        resolvers = [
            (path, text) for path, text in _texts(self._data, "") if "${" in text and ":" in text.partition("${")[2]
        ]
        for path, text in resolvers:
            reader.say(
                path,
                f"{text!r} calls a resolver, and recipes run no code; only plain references such as ${{output_dir}} "
                "are followed",
            )
        if resolvers:
            reader.raise_problems()
        try:
            return OmegaConf.to_container(OmegaConf.create(self._data), resolve=True)  # type: ignore[return-value]
        except OmegaConfBaseException as error:
            path = str(getattr(error, "full_key", None) or "")
            reader.say(path, str(error).splitlines()[0]) if path else reader.problems.append(_short(error))
            raise InputError(reader.problems) from error

    def _override(self, override: str) -> str | None:
        name, sign, text = override.partition("=")
        keys = re.sub(r"\[(\d+)\]", r".\1", name.strip()).split(".")
        if not sign or not all(keys):
            return f"command line: expected section.key=value, got {override!r}; for example training.max_steps=100"
        path = ".".join(keys)
        try:
            value = _parse(f"value: {text}", path)["value"]
        except InputError as error:
            return f"{path} (command line): {text!r} is not valid YAML: {error.problems[0].rpartition(': ')[2]}"
        self._changed.add(path)
        problem = _set(self._data, keys, value)
        return f"{path} (command line): {problem}" if problem else None


def _lines(text: str, name: str) -> dict[str, int]:
    """Dotted path -> line of every key and list item."""
    found: dict[str, int] = {}

    def walk(node: yaml.Node | None, path: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                inner = f"{path}.{key.value}" if path else str(key.value)
                found[inner] = key.start_mark.line + 1
                walk(value, inner)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                found[f"{path}.{index}"] = item.start_mark.line + 1
                walk(item, f"{path}.{index}")

    try:
        walk(yaml.compose(text, Loader=yaml.SafeLoader), "")
    except yaml.YAMLError as error:
        raise InputError(f"{name}: not valid YAML: {_short(error)}") from error
    return found


def _parse(text: str, name: str) -> dict[str, Any]:
    try:
        data = OmegaConf.to_container(OmegaConf.create(text), resolve=False) if text.strip() else {}
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"{name}: not valid YAML: {_short(error)}") from error
    if not isinstance(data, dict):
        raise InputError(f"{name}: expected sections such as `data:` and `student:`, got a {type(data).__name__}")
    return {str(key): value for key, value in data.items()}


def _short(error: Exception) -> str:
    """The first thing a YAML error says, with its line."""
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return where + str(getattr(error, "problem", None) or str(error).splitlines()[0])


def _set(data: Any, keys: list[str], value: Any) -> str | None:
    """Sets one value deep inside; returns what is wrong with the way there."""
    for depth, key in enumerate(keys):
        index: Any = key
        if isinstance(data, list):
            if not key.isdigit() or int(key) >= len(data):
                return f"the list {'.'.join(keys[:depth])} has items 0 to {len(data) - 1}, got {key!r}"
            index = int(key)
        elif not isinstance(data, dict):
            return f"{'.'.join(keys[:depth])} is {data!r}, not a section; set it as a whole"
        if depth == len(keys) - 1:
            data[index] = value
            return None
        if isinstance(data, dict) and data.get(index) is None:
            data[index] = [{}] if keys[depth + 1] == "0" else {}
        data = data[index]
    return None


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        inner = f"{path}.{key}" if path else str(key)
        if isinstance(item, str):
            yield inner, item
        else:
            yield from _texts(item, inner)
