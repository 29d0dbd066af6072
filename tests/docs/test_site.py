"""The site builds without a warning, and loads nothing from elsewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from ..policy.sources import ROOT

NEEDED = ("mkdocs", "material", "mkdocstrings")
pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in NEEDED), reason='the site needs mkdocs: pip install -e ".[docs]"'
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    made = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert made.returncode == 0, made.stderr[-3000:]
    return folder


def test_every_page_is_there_and_found(site: Path) -> None:
    found = {
        entry["location"].partition("#")[0]
        for entry in json.loads((site / "search/search_index.json").read_text())["docs"]
    }
    pages = {str(page.relative_to(ROOT / "docs").with_suffix("")) for page in (ROOT / "docs").rglob("*.md")}
    assert {f"{page}/" for page in pages - {"index"}} <= found
    losses = (site / "api/losses/index.html").read_text(encoding="utf-8")
    assert "subsample" in losses and "Raises" in (site / "api/trainer/index.html").read_text(encoding="utf-8")


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\bsrc=\"?([^\s\">]+)", text)
        loaded += re.findall(r"<link[^>]*rel=\"?(?:stylesheet|preconnect|icon)\"?[^>]*href=\"?([^\s\">]+)", text)
        assert not [address for address in loaded if address.startswith(("http", "//"))], page


def test_no_markdown_is_left_in_the_text(site: Path) -> None:
    """GitHub and the site read lists, tables and fences a little differently."""
    for page in site.rglob("index.html"):
        article = re.search(r"<article.*?</article>", page.read_text(encoding="utf-8"), re.DOTALL)
        assert article is not None
        text = re.sub(r"<(pre|code|script|style)\b.*?</\1>", "", article[0], flags=re.DOTALL)
        left = re.findall(r".{0,30}(?:\|---|```|\]\(|\*\*|`).{0,30}", re.sub(r"<[^>]+>", "", text))
        assert not left, f"{page}: {left}"
