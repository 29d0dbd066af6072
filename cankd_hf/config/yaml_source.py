"""Reads YAML and `a.b=value` overrides into plain data with the line of each value; runs no code."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from cankd_hf.config.schema import Problems
from cankd_hf.errors import InputError


class YamlSource:
    """A YAML document with overrides applied.

    `5e-4` is read as a number. References (`${section.key}`) are resolved; resolvers (`${oc.env:...}`, which would
    write secrets into saved files) and YAML tags are refused.

    Args:
        text: the document.
        overrides: `section.key=value`; items of a list by number.
        name: name of the document in messages, usually its file.

    Raises:
        InputError: if it is not valid YAML, or not a mapping.
    """

    def __init__(self, text: str, overrides: Sequence[str], name: str) -> None:
        self.name = name
        self._changed: set[str] = set()
        self._wrong: list[tuple[str, str]] = []
        try:
            self._lines = _lines(text)
            self._data = OmegaConf.to_container(OmegaConf.create(text), resolve=False) if text.strip() else {}
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise InputError(f"{name}: not valid YAML: {_short(error)}") from error
        if not isinstance(self._data, dict):
            kind = type(self._data).__name__
            raise InputError(f"{name}: expected sections such as `data:` and `student:`, got a {kind}")
        for override in overrides:
            self._override(override)

    def place(self, path: str) -> str:
        """A dotted path followed by where it was set: file and line, or the command line."""
        if any(path == key or path.startswith(key + ".") for key in self._changed):
            return f"{path} (command line)"
        if path not in self._lines and any(key.startswith(path + ".") for key in self._changed):
            return f"{path} (command line)"
        known = path
        while known and known not in self._lines:
            known = known.rpartition(".")[0]
        return f"{path} ({self.name}:{self._lines[known]})" if known else f"{path} ({self.name})"

    def read(self, problems: Problems) -> dict[str, Any]:
        """The data with references resolved; invalid overrides and references are added to `problems`."""
        for path, message in self._wrong:
            problems.say(path, message, unread=True)
        data = self._data
        for path, container, key in list(_texts(data)):
            text = container[key]
            if "${" in text and ":" in text.partition("${")[2]:
                message = f"{text!r} calls a resolver, and recipes run no code; only plain references such as "
                problems.say(path, message + "${output_dir} are followed", unread=True)
                container[key] = None
        return {str(key): value for key, value in _followed(OmegaConf.create(data), "", problems).items()}

    def _override(self, override: str) -> None:
        name, sign, text = override.partition("=")
        keys = re.sub(r"\[(\d+)\]", r".\1", name.strip()).split(".")
        if not sign or not all(keys):
            message = f"command line: expected section.key=value, got {override!r}; for example training.max_steps=100"
            self._wrong.append(("", message))
            return
        path = ".".join(keys)
        self._changed.add(path)
        try:
            value = OmegaConf.to_container(OmegaConf.create(f"value: {text}"), resolve=False)["value"]  # type: ignore
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            self._wrong.append((path, f"{text!r} is not valid YAML: {_short(error)}"))
            return
        if problem := _set(self._data, keys, value):
            self._wrong.append((path, problem))


def _lines(text: str) -> dict[str, int]:
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

    walk(yaml.compose(text, Loader=yaml.SafeLoader), "")
    return found


def _short(error: Exception) -> str:
    """The first line of a YAML error, with its position."""
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return where + str(getattr(error, "problem", None) or str(error).splitlines()[0])


def _set(data: Any, keys: list[str], value: Any) -> str | None:
    """Sets a nested value; returns the problem if its path is invalid."""
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


def _texts(value: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """All strings in the data: dotted path, container, and key in the container."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        inner = f"{path}.{key}" if path else str(key)
        if isinstance(item, dict | list):
            yield from _texts(item, inner)
        elif isinstance(item, str):
            yield inner, value, key


def _followed(node: Any, path: str, problems: Problems) -> Any:
    """Plain data with references resolved; an invalid reference is added to `problems` and becomes null."""
    if not isinstance(node, DictConfig | ListConfig):
        return node
    found: dict[Any, Any] = {}
    keys: Any = node if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        inner = f"{path}.{key}" if path else str(key)
        try:
            found[key] = _followed(node[key], inner, problems)
        except MissingMandatoryValue:
            message = f"expected a value from you; give it on the command line: {inner}=..."
            problems.say(inner, message, unread=True)
        except OmegaConfBaseException as error:
            problems.say(inner, str(error).splitlines()[0], unread=True)
        found.setdefault(key, None)
    return found if isinstance(node, DictConfig) else list(found.values())
