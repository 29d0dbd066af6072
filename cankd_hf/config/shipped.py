"""The recipes and comparisons that come with the package: inside of it in a wheel, beside it in a checkout."""

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def shipped_folder(kind: str) -> Path:
    """The folder of the `recipe` or `comparison` files that come with the package."""
    inside = _PACKAGE / "shipped" / f"{kind}s"
    return inside if inside.is_dir() else _PACKAGE.parent / f"{kind}s"


def shipped_files(kind: str) -> list[Path]:
    """The files that come with the package, by name."""
    return sorted(shipped_folder(kind).glob("*.yaml"))


def find_shipped(path: str | Path, kind: str) -> Path:
    """The file of a `recipe` or `comparison`.

    A file that exists is taken as it is. Otherwise `NAME`, `NAME.yaml` and `recipes/NAME.yaml`, as the documentation
    writes it, mean the one of this name that comes with the package; anything else is returned as it is.
    """
    given = Path(path)
    try:
        if given.exists() or given.parent not in (Path("."), Path(f"{kind}s")):
            return given
    except (OSError, ValueError):  # a name that no file can have; reading it tells what is wrong
        return given
    found = shipped_folder(kind) / given.with_suffix(".yaml").name if given.suffix in ("", ".yaml") else given
    return found if found.is_file() else given


def summary(text: str) -> str:
    """The first sentence of the comment at the beginning of a recipe."""
    return text.partition("\n")[0].removeprefix("#").strip()
