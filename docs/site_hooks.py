"""Hooks of mkdocs: links to files beside docs/, and the scripts of docs/examples on their page."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(\[[^\]\n]*\])\(([^)\s#]+)((?:#[^)\s]*)?)\)")


def repository() -> str:
    """The address of the repository, as the package names it."""
    found = re.search(r'^REPOSITORY = "(.+)"$', (ROOT / "cankd_hf/names.py").read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else ""


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Sends links to the repository's other files and folders there: on GitHub they are relative."""
    folder, address = Path(page.file.abs_src_path).parent, repository()
    if page.file.src_uri.startswith("api/"):
        page.meta["search"] = {"boost": 0.4}  # guides come first in the search

    def moved(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        if "://" in link[2] or not target.exists() or (target.is_relative_to(DOCS) and target.is_file()):
            return link[0]
        return f"{link[1]}({address}/blob/main/{target.relative_to(ROOT)}{link[3]})" if address else link[1][1:-1]

    found = LINK.sub(moved, markdown)
    return found + "".join(examples()) if page.file.src_uri == "examples.md" else found


def examples() -> list[str]:
    """A section for each script: the first line of its docstring, and its code."""
    made = []
    for file in sorted((DOCS / "examples").glob("*.py")):
        code = file.read_text(encoding="utf-8")
        title = (ast.get_docstring(ast.parse(code)) or file.stem).partition("\n")[0].rstrip(".")
        code = re.sub(r'^""".*?"""\n+', "", code, count=1, flags=re.DOTALL)
        made.append(f"\n## {title}\n\n[`{file.name}`](examples/{file.name})\n\n```python\n{code}```\n")
    return made
