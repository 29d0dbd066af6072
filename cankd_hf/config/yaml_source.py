"""Reads YAML and `a.b=value` overrides into plain data with the line of each value; runs no code."""

import copy
import re
from collections.abc import Iterator, Sequence
from typing import Any

from cankd_hf.config.advice import show
from cankd_hf.config.plain_yaml import CONTROL, MAX_DEPTH, MAX_TEXT, parse_yaml, quoted
from cankd_hf.config.schema import Problems
from cankd_hf.errors import InputError
from cankd_hf.tokens import NO_TOKEN, holds_secret, is_secret

_REFERENCE = re.compile(r"\$\{([^{}]*)\}")


class YamlSource:
    """A YAML document with overrides applied.

    `5e-4` is read as a number. References (`${section.key}`) are resolved; resolvers (`${oc.env:...}`, which would
    write secrets into saved files) and YAML tags are refused, as is whatever looks like a token.

    Args:
        text: the document.
        overrides: `section.key=value`; items of a list by number.
        name: name of the document in messages, usually its file.

    Raises:
        InputError: if it is not valid YAML, not a mapping, or holds a token, which the message does not repeat.
    """

    def __init__(self, text: str, overrides: Sequence[str], name: str) -> None:
        self.name = name
        self._changed: set[str] = set()
        self._wrong: list[tuple[str, str]] = []
        _refuse_secrets(text, overrides, name)
        self._data, self._lines, self._wrong = parse_yaml(text, name)
        if self._data is None:
            self._data = {}
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
        for path, container, key in list(_leaves(self._data)):
            if is_secret(key, container[key]):
                problems.say(path, NO_TOKEN, unread=True)
                container[key] = None
        # Resolved against the data as they were written, so that the order of references does not matter.
        found = [
            (path, container, key, self._resolved(container[key], path, problems, ()))
            for path, container, key in list(_leaves(self._data))
            if isinstance(container[key], str) and ("${" in container[key] or container[key] == "???")
        ]
        for _, container, key, value in found:
            container[key] = value
        return {str(key): value for key, value in self._data.items()}

    def _resolved(self, text: str, path: str, problems: Problems, seen: tuple[str, ...]) -> Any:
        """A text with its references filled in, or the value itself where the text is one reference; else null."""
        try:
            return self._filled(text, path, seen)
        except InputError as error:
            problems.say(path, error.problems[0], unread=True)
            return None

    def _filled(self, text: str, path: str, seen: tuple[str, ...]) -> Any:
        if text == "???":
            raise InputError(f"expected a value from you; give it on the command line: {path}=...")
        if ":" in text.partition("${")[2]:
            message = f"{show(text)} calls a resolver, and recipes run no code; only plain references such as "
            raise InputError(message + "${output_dir} are followed")
        whole = _REFERENCE.fullmatch(text)
        if whole:
            return self._value(whole[1], seen)
        filled = _REFERENCE.sub(lambda match: self._as_text(match[1], seen), text)
        if "${" in filled:
            raise InputError(f"expected references such as ${{output_dir}}, got {show(text)}; close each of them")
        if len(filled) > MAX_TEXT:
            raise InputError(f"expected a text of at most {MAX_TEXT} characters after its references; shorten it")
        return filled

    def _value(self, name: str, seen: tuple[str, ...]) -> Any:
        """The value at a dotted path, which may itself be a reference."""
        if name in seen or len(seen) > MAX_DEPTH:
            raise InputError(f"refers to itself: {' -> '.join([*seen, name][-5:])}; write the value")
        value: Any = self._data
        for key in name.split("."):
            try:
                value = value[int(key)] if isinstance(value, list) else value[key]
            except (KeyError, IndexError, ValueError, TypeError):
                raise InputError(f"Interpolation key {quoted(name)} not found") from None
        if isinstance(value, dict | list):
            if any(isinstance(box[key], str) and "${" in box[key] for _, box, key in _leaves(value)):
                raise InputError(f"{name} holds references itself; refer to single values")
            return copy.deepcopy(value)
        return self._filled(value, name, (*seen, name)) if isinstance(value, str) else value

    def _as_text(self, name: str, seen: tuple[str, ...]) -> str:
        value = self._value(name, seen)
        if isinstance(value, dict | list) or value is None:
            raise InputError(f"expected a text or number at {name} to put into a text, got {show(value)}")
        return str(value).lower() if isinstance(value, bool) else str(value)

    def _override(self, override: str) -> None:
        name, sign, text = override.partition("=")
        keys = re.sub(r"\[(\d+)\]", r".\1", name.strip()).split(".")
        if not sign or not all(keys) or len(keys) > MAX_DEPTH or len(name) > 500 or CONTROL.search(name):
            message = f"command line: expected section.key=value, got {quoted(override)}"
            self._wrong.append(("", f"{message}; for example training.max_steps=100"))
            return
        path = ".".join(keys)
        self._changed.add(path)
        try:
            value, _, wrong = parse_yaml(text, "", depth=len(keys))
        except InputError as error:
            said, secret = error.problems[0].removeprefix(": "), is_secret(keys[-1], text)
            shown = f"{quoted(text)} is " if said.startswith("not valid") and not secret else ""
            self._wrong.append((path, shown + said))
            return
        self._wrong += [(f"{path}.{inner}".rstrip("."), message) for inner, message in wrong]
        if problem := _set(self._data, keys, value):
            self._wrong.append((path, problem))


def _refuse_secrets(text: str, overrides: Sequence[str], name: str) -> None:
    """Raises before anything is parsed, because messages about other mistakes would repeat the text."""
    said = "looks like a token or password; "
    found = [f"{name}:{line}: {said}{NO_TOKEN}" for line, row in enumerate(text.split("\n"), 1) if holds_secret(row)]
    for override in overrides:
        key = override.partition("=")[0]
        if holds_secret(override):
            found.append(f"{'command line' if holds_secret(key) else f'{key[:100]} (command line)'}: {said}{NO_TOKEN}")
    if found:
        raise InputError(found)


def _set(data: Any, keys: list[str], value: Any) -> str | None:
    """Sets a nested value; returns the problem if its path is invalid."""
    for depth, key in enumerate(keys):
        index: Any = key
        if isinstance(data, list):
            index = int(key) if re.fullmatch(r"[0-9]{1,6}", key) else len(data)
            if index >= len(data):
                has = f"items 0 to {len(data) - 1}" if data else "no items"
                return f"the list {'.'.join(keys[:depth])} has {has}, got {quoted(key)}"
        elif not isinstance(data, dict):
            return f"{'.'.join(keys[:depth])} is {show(data)}, not a section; set it as a whole"
        elif key not in data and key.isdecimal() and len(key) < 10 and int(key) in data:
            index = int(key)
        if depth == len(keys) - 1:
            data[index] = value
            return None
        if isinstance(data, dict) and data.get(index) is None:
            data[index] = [{}] if keys[depth + 1] == "0" else {}
        data = data[index]
    return None


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """All values that are neither mapping nor list: dotted path, container, and key in the container."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        inner = f"{path}.{key}" if path else str(key)
        if isinstance(item, dict | list):
            yield from _leaves(item, inner)
        else:
            yield inner, value, key
