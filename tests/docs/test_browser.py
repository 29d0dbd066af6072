"""A browser opens the start page, searches, and opens an API page (`pytest -m slow tests/docs/test_browser.py`).

Needs chromium on the path and `pip install playwright`; pictures go to $CANKD_SCREENSHOTS, else to a temporary folder.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from .test_site import pytestmark as needs_mkdocs
from .test_site import site  # noqa: F401  (a fixture)

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    needs_mkdocs,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium"),
]


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:  # noqa: F811
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_start_search_and_api(address: str, tmp_path: Path) -> None:
    pictures = Path(os.environ.get("CANKD_SCREENSHOTS", tmp_path))
    elsewhere, errors = [], []
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.on("request", lambda asked: asked.url.startswith((address, "data:")) or elsewhere.append(asked.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{address}/index.html")
        assert page.locator("h1").inner_text().startswith("cankd_hf")
        assert page.locator("img[alt^='Test images']").evaluate("image => image.naturalWidth") > 100
        page.screenshot(path=pictures / "start.png")

        page.locator("input.md-search__input").click()
        page.keyboard.type("attention transfer")
        page.wait_for_selector(".md-search-result__item a", timeout=15000)
        assert "attention" in page.locator(".md-search-result__list").inner_text().lower()
        page.screenshot(path=pictures / "search.png")

        page.goto(f"{address}/api/losses/")
        assert page.locator("#cankd_hf\\.losses\\.cankd\\.CanKDLoss").count() == 1
        page.locator("#cankd_hf\\.losses\\.cankd\\.CanKDLoss").scroll_into_view_if_needed()
        page.screenshot(path=pictures / "api.png")
        browser.close()
    assert not elsewhere and not errors
    assert all((pictures / f"{name}.png").stat().st_size > 10_000 for name in ("start", "search", "api"))
