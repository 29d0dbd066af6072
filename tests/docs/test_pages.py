"""Links, anchors, code blocks, keys, commands and quoted messages of the pages hold."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import fnmatch
import json
import re
import subprocess
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from cankd_hf.__main__ import COMMANDS
from cankd_hf.compare.settings import read_comparison
from cankd_hf.config.reading import read_recipe
from cankd_hf.config.recipe import Recipe
from cankd_hf.losses import LOSSES, OWN_LOSSES
from cankd_hf.training.arguments import CanKDConfig

from ..policy.sources import ROOT, package_files, parsed

DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md"), *(ROOT / "model_cards").glob("README.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
SECTION = "data|student|teacher|distill|training|hub"
KEY = re.compile(rf"`((?:{SECTION})(?:\.\w+)+)(?:[=:][^`]*)?`")
NO_KEYS = {"data.key", "data.yaml"}  # a placeholder, and a file of other libraries


def names(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return BLOCK.sub("", text_of(page))


@cache
def anchors(page: Path) -> set[str]:
    """Names of the headings, as GitHub makes them."""
    found: dict[str, int] = {}
    for title in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {slug if number == 0 else f"{slug}-{number}" for slug, last in found.items() for number in range(last + 1)}


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    wrong = []
    for link in LINK.findall(prose(page)):
        place, _, anchor = link.partition("#")
        if "://" in link or link.startswith("mailto:"):
            continue
        target = (page.parent / place).resolve() if place else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            wrong.append(link)
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_code_blocks_are_valid(page: Path) -> None:
    for language, code in BLOCK.findall(text_of(page)):
        if language == "python":
            compile(code, names(page), "exec")
        elif language == "bash":
            subprocess.run(["bash", "-n"], input=code, text=True, check=True)
        elif language == "json":
            json.loads(code if code.lstrip().startswith("{") else "{" + code + "}")
        elif language == "yaml":
            read_fragment(yaml.safe_load(code))
        else:
            assert language in ("", "text", "bibtex"), f"{language}: write bash, python, yaml, json or text"


def read_fragment(given: dict[str, Any]) -> None:
    """Reads a part of a recipe or of a comparison; what it leaves out is that of another one."""
    if not given.keys() <= {field.name for field in dataclasses.fields(Recipe)}:
        whole: dict[str, Any] = {"base": "recipes/quickstart.yaml", "output_dir": "runs/x", "arms": {"cankd": None}}
        read_comparison(yaml.safe_dump(whole | {"budgets": [{"steps": 10}]} | given, sort_keys=False))
        return
    whole = yaml.safe_load((ROOT / "recipes/quickstart.yaml").read_text(encoding="utf-8"))
    if "teachers" in given:  # instead of the one
        del whole["teacher"]
    for key, value in given.items():
        if isinstance(value, dict):
            one_of = {"model", "config", "backbone"}  # a model is given in one of these ways
            kept = {
                name: old for name, old in whole.get(key, {}).items() if not (one_of & {name} and one_of & {*value})
            }
            value = {**kept, **value}
        whole[key] = value
    _, problems = read_recipe(yaml.safe_dump(whole, sort_keys=False), [], "block")
    problems.raise_all()


@cache
def known_keys() -> set[str]:
    """Keys of a recipe: those of the tables in docs/recipes.md, which a test keeps, and the training arguments."""
    listed = set(re.findall(r"^\| `([a-z]+\.[\w.]+)` \|", text_of(DOCS / "recipes.md"), re.MULTILINE))
    return listed | {f"training.{field.name}" for field in dataclasses.fields(CanKDConfig)}


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=names)
def test_keys_of_recipes_exist(page: Path) -> None:
    wrong = []
    for key in set(KEY.findall(prose(page))) - NO_KEYS:
        parts = re.sub(r"\.\d+\b", ".N", key).split(".")
        heads = [".".join(parts[:count]) for count in range(2, len(parts) + 1)]
        known = known_keys()
        # a key, the section that holds it, or an entry of a free section: `student.backbone.hidden_sizes`
        if not any(head in known for head in heads) and not any(one.startswith(f"{key}.") for one in known):
            wrong.append(key)
    assert not wrong


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """Every option of a parser and of its sub-commands."""
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {option for inner in action.choices.values() for option in options_of(inner)}
    return found


@cache
def known_options(command: str) -> set[str]:
    module = import_module(f"cankd_hf.{command}")
    make = getattr(module, "parser", None) or getattr(module, "_parser", None)
    if make is None:
        make = import_module(f"cankd_hf.cli.{command}").parser
    return options_of(make())


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_commands_of_cankd_exist_with_their_options(page: Path) -> None:
    joined = re.sub(r"\\\n\s*", " ", text_of(page))
    for command, words in re.findall(r"(?:`|^)cankd ([a-z]\w*)([^`\n#]*)", joined, re.MULTILINE):
        assert command in COMMANDS, f"cankd {command}"
        unknown = set(re.findall(r"(?<!\S)(--[\w-]+)", words)) - known_options(command)
        assert not unknown, f"cankd {command}{words}: {unknown}"


@cache
def said() -> set[str]:
    """Every text in the package, with `…` for what is filled in."""

    def told(node: ast.AST) -> str:
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else "…"
        if isinstance(node, ast.JoinedStr):
            return "".join(told(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return told(node.left) + told(node.right)
        return "…"

    kinds = (ast.Constant, ast.JoinedStr, ast.BinOp)
    texts = {told(node) for file in package_files() for node in ast.walk(parsed(file)) if isinstance(node, kinds)}
    return {plain(text) for text in texts if len(text) > 12}


def plain(text: str) -> str:
    text = re.sub(r"%(?:\.\d)?[sdfg]", "…", text).replace("%%", "%")
    return re.sub("…+", "…", text)


QUOTED = re.findall(r"^- `(.+)`$", text_of(DOCS / "troubleshooting.md"), re.MULTILINE)


@pytest.mark.parametrize("message", QUOTED)
def test_quoted_messages_are_those_of_the_package(message: str) -> None:
    assert len(message.replace("…", "").strip()) > 10
    assert any(plain(message).rstrip("…") in text for text in said())


def test_messages_are_quoted() -> None:
    assert len(QUOTED) > 40


def test_every_loss_has_its_paper() -> None:
    rows = {
        cells[1]: cells for line in text_of(DOCS / "papers.md").splitlines() if len(cells := line.split(" | ")) == 5
    }
    listed = {row[0].strip("|` "): row for row in rows.values()}
    assert {name for name in listed if name != "loss" and not set(name) <= {"-"}} == {*LOSSES, *OWN_LOSSES}
    recipes = {file.stem: file.read_text(encoding="utf-8") for file in (ROOT / "recipes").glob("*.yaml")}
    for name, (_, paper, _, file, named) in listed.items():
        if name in LOSSES:
            identifier = LOSSES[name].paper
            assert identifier is None or name == "static_linear" or identifier in paper, name
            assert (ROOT / "cankd_hf/losses" / file.strip("`")).is_file()
            using = {recipe for recipe, text in recipes.items() if re.search(rf"\bloss: {name}\b", text)}
            patterns = re.findall(r"`(.+?)`", named)
            assert bool(patterns) == bool(using), name
            assert all(fnmatch.filter(using, pattern) for pattern in patterns), name
