"""HTML pages of one frame: each holds everything that it shows, and follows the reader's choice of dark or light."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

FRAME = Path(__file__).parent
STYLE = FRAME / "page.css"


def render_page(template: Path, **values: Any) -> str:
    """The page of a template, which extends `frame.html`; everything in `values` is escaped."""
    loader = jinja2.FileSystemLoader([template.parent, FRAME])
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=loader)
    return environment.get_template(template.name).render(style=Markup(STYLE.read_text(encoding="utf-8")), **values)
