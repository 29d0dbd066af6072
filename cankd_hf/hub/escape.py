"""Names of others in Markdown: of classes, files, runs and models. They are shown as they are and do nothing."""

import html
import re

# Signs that begin markup; `_` does so only at the edge of a word.
_MARKUP = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")


def text(value: object) -> str:
    """A value as text of one line: no markup, no HTML, no link, no end of a table's cell."""
    line = html.escape(" ".join(str(value).split()), quote=False)
    return _MARKUP.sub(lambda match: f"\\{match[0]}", line).replace("://", "&#58;//")


def code(value: object) -> str:
    """A value as code in a line, whatever backticks it holds."""
    line = " ".join(str(value).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line[:1] == "`" or line[-1:] == "`" else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def plain(markdown: str) -> str:
    """A line of a card as plain text, without links, code marks and escapes."""
    line = re.sub(r"\[((?:[^\]\\]|\\.)*)\]\([^)]*\)", r"\1", markdown)
    line = re.sub(r"(?<!\\)`+", "", line)
    return html.unescape(re.sub(r"\\([\\`*\[\]|~$_])", r"\1", line))
