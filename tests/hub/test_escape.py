"""Names of classes, files, runs and models in cards and reports are shown as they are and do nothing."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from rich.table import Table

from cankd_hf.commands import console
from cankd_hf.hub import escape
from cankd_hf.hub.card import card_for, write_card
from cankd_hf.hub.facts import read_facts
from cankd_hf.tasks.pictures import draw_grid
from cankd_hf.visualize.session import Drawn, _html

from .test_card import RECIPE, RESULTS, RUN

NASTY = [
    "<script>alert(1)</script>",
    "![x](http://evil.example/x.png)",
    "[click](https://evil.example)",
    "a|b|c",
    "`rm -rf`",
    "``` \n# heading",
    "{{ metadata }} {% for %}",
    "*bold* _it_ ~~gone~~ a_b_c __init__",
    "x\n---\nlicense: mit",
    "--> <!-- x",
    'quo"te\\back\\',
    "&lt;b&gt; &amp;",
    "http://evil.example",
    "$x$ :tada: [/red]",
    "日本 é",
]


def tokens(text: str) -> list[Any]:
    """All tokens of a Markdown text, those inside of lines too."""
    found = []
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text):
        found += [token, *(token.children or [])]
    return found


def shown(text: str) -> str:
    """What a reader sees of a line."""
    (line,) = (
        token for token in MarkdownIt("commonmark").enable("strikethrough").parse(text) if token.type == "inline"
    )
    return "".join(child.content for child in line.children or [])


@pytest.mark.parametrize("name", NASTY)
def test_text_and_code_show_the_name_and_nothing_else(name: str) -> None:
    for written in (escape.text(name), escape.code(name)):
        assert shown(f"name: {written}, and more").removeprefix("name: ") == f"{' '.join(name.split())}, and more"
        kinds = {token.type for token in tokens(f"name: {written}, and more")}
        assert kinds <= {"paragraph_open", "paragraph_close", "inline", "text", "text_special", "code_inline"}
    assert escape.plain(f"**{escape.text(name)}") == f"**{' '.join(name.split())}"
    row = tokens(f"| a | b |\n| --- | --- |\n| {escape.text(name)} | 2 |\n")
    assert sum(token.type == "td_open" for token in row) == 2


def nasty_folder(place: Path, name: str) -> Path:
    """A student all of whose names are this one."""
    folder = place / "".join(sign for sign in name if sign not in "/\n")
    folder.mkdir()
    config = {
        "model_type": "cankd_fpn",
        "id2label": {"0": name, "1": "b"},
        "architectures": ["FPNForSemanticSegmentation"],
    }
    teacher = {"model": name, "class": name, "taps": [name], "revision": name, "parameters": 3}
    terms = [{"name": name, "loss": "cankd", "pairs": [{"weight": 1.0, "student_stride": 4, "teacher_stride": 4}]}]
    run = {**RUN, "teacher": teacher, "terms": terms, "hardware": name, "inherited": [name]}
    run.pop("pipeline_tag", None)
    arms = [{**arm, "name": name} if arm["name"] == "teacher" else arm for arm in RESULTS["arms"]]
    line = " ".join(name.split())  # a recipe holds no text of several lines
    recipe = {**RECIPE, "data": {"path": f"/data/{line}"}, "hub": {"license": line, "tags": [line]}}
    files = {"config": config, "distillation": run, "results": {**RESULTS, "split": name, "arms": arms}}
    for file, content in files.items():
        (folder / f"{file}.json").write_text(json.dumps(content))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.mark.parametrize("name", NASTY)
def test_a_card_of_nasty_names(name: str, tmp_path: Path) -> None:
    folder = nasty_folder(tmp_path, name)
    file = write_card(folder)
    text = file.read_text(encoding="utf-8")
    card = ModelCard(text)
    line = " ".join(name.split())
    assert card.data.license == line and line in (card.data.tags or [])
    body = card.text
    found = tokens(body)
    assert not [token for token in found if token.type in ("image", "html_inline")]
    assert [token.content.startswith("<!-- written by") for token in found if token.type == "html_block"] == [True]
    links = [token.attrs["href"] for token in found if token.type == "link_open"]
    assert all(link.startswith("https://huggingface.co/") or link == "recipe.yaml" for link in links), links
    headings = [token.tag for token in found if token.type == "heading_open"]
    assert headings == ["h1", "h2", "h2", "h2", "h2", "h2"]
    assert [token.info for token in found if token.type == "fence"] == ["python", "bibtex"]
    cells, row = [], 0
    for token in found:
        row = 0 if token.type == "tr_open" else row + (token.type in ("td_open", "th_open"))
        if token.type == "tr_close":
            cells.append(row)
    assert len(set(cells)) == 2, cells
    pushed = card_for(folder, "me/name")
    assert '"me/name"' in pushed and "written by cankd_hf" not in pushed
    assert write_card(folder).read_text(encoding="utf-8") == text  # it knows its own card again


@pytest.mark.parametrize("name", NASTY)
def test_a_report_of_nasty_names(name: str, tmp_path: Path) -> None:
    opened: Any = SimpleNamespace(
        facts=read_facts(nasty_folder(tmp_path, name)), histories={}, notes=[name], teachers={}, recipe=None
    )
    curves = Drawn("curves", "", b"\0" * 24)
    page = _html(name, opened, [Drawn("heat", name, b"\0" * 24)], curves, [name])
    seen: list[tuple[str, dict[str, str | None]]] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: seen.append((tag, dict(attrs)))  # type: ignore[method-assign]
    parser.feed(page)
    assert "script" not in {tag for tag, _ in seen}
    assert all(str(attrs["src"]).startswith("data:image/png") for tag, attrs in seen if tag == "img")
    assert all(str(attrs["href"]).startswith("#") for tag, attrs in seen if tag == "a")
    harmless = "html head meta title style body header h1 h2 h3 p nav a main section ul li table thead tbody tr th td"
    harmless += " div figure figcaption b img dl dt dd"
    assert {tag for tag, _ in seen} <= set(harmless.split())


def test_tables_and_pictures_show_names_as_they_are(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in NASTY:
        table = Table(title=name)
        table.add_column("name")
        table.add_row(name)
        console(200).print(table)
        assert capsys.readouterr().out.count(name.split("\n")[0]) == 2
        grey = np.zeros((4, 4, 3))
        draw_grid(tmp_path / "x.png", [name if name.isascii() else "x"], [[grey]], [("$\\frac{$", "k")], width=100)
