"""One address of the project, one way to install it; what a release needs agrees with the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import cankd_hf
from cankd_hf._moved import MOVED, RENAMED
from cankd_hf.losses import CanKDLoss
from cankd_hf.names import INSTALL, REPOSITORY, SOURCE
from cankd_hf.tasks.base import NOTE

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = [
    path
    for path in (
        *ROOT.glob("*.md"),
        *ROOT.glob("*.cff"),
        *ROOT.glob("mkdocs.yml"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / ".github").rglob("*.*"),
        *NOTEBOOKS,
    )
    if path.name != "CHANGELOG.md"
]
FOREIGN = ("github.com/me/", "github.com/astral-sh/", "github.com/lightly-ai/")
RAW = REPOSITORY.replace("github.com", "raw.githubusercontent.com") + "/main/"
BLOB = re.compile(rf"{re.escape(REPOSITORY)}/(?:blob|tree)/main/([\w./-]+)")


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_whatever_installs_the_package_does_it_in_the_one_way(path: Path) -> None:
    content = text(path).replace('\\"', '"')
    for line in re.findall(r"^.*pip install.*\bcankd-hf\b.*$", content, re.MULTILINE):
        extra = re.sub(r"cankd-hf\[\w+\]", "cankd-hf", line)
        assert f'"cankd-hf{SOURCE}"' in extra, f"expected {INSTALL}, got {line}"


def test_there_are_pages_that_install_it_and_cards_do() -> None:
    said = [path.name for path in PAGES if f"cankd-hf{SOURCE}" in text(path)]
    assert {"README.md", *(path.name for path in NOTEBOOKS)} <= set(said)
    assert INSTALL in NOTE


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_addresses_of_the_project_lead_to_files_that_are_there(path: Path) -> None:
    content = text(path)
    assert not [name for name in BLOB.findall(content) if not (ROOT / name).exists()]
    assert not [name for name in re.findall(rf"{re.escape(RAW)}([\w./-]+)", content) if not (ROOT / name).is_file()]
    assert f"{REPOSITORY}s" not in content


def test_pictures_and_links_of_the_readme_are_absolute() -> None:
    """The package index shows the same page, and has no files beside it."""
    links = re.findall(r"\]\(([^)]+)\)", text(ROOT / "README.md"))
    assert len(links) > 20 and not [link for link in links if not link.startswith("https://")]
    assert len(text(ROOT / "README.md").splitlines()) <= 150, "the pages in docs/ have the details"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_in_colab(path: Path) -> None:
    place = f"{REPOSITORY.removeprefix('https://')}/blob/main/notebooks/{path.name})"
    assert f"(https://colab.research.google.com/{place.replace('github.com', 'github')}" in text(path)


def test_the_citation_is_of_this_version_and_this_paper() -> None:
    cited = yaml.safe_load(text(ROOT / "CITATION.cff"))
    paper = cited["preferred-citation"]
    assert cited["version"] == cankd_hf.__version__ and cited["repository-code"] == REPOSITORY
    assert paper["title"] in CanKDLoss.citation and paper["url"].endswith(CanKDLoss.paper)
    assert [author["family-names"] for author in paper["authors"]] == ["Sun", "Ohyama"]


def test_the_metadata_promises_the_pythons_that_the_matrix_tries() -> None:
    project = pytest.importorskip("tomllib", reason="since Python 3.11").loads(text(ROOT / "pyproject.toml"))[
        "project"
    ]
    said = [line.rpartition(" ")[2] for line in project["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert said == ["3.10", "3.11", "3.12", "3.13", "3.14"] and project["requires-python"] == f">={said[0]}"
    page = text(ROOT / "docs/matrix.md")
    assert re.findall(r"^\| (3\.\d+) \| newest \|", page, re.MULTILINE) == said
    jobs = yaml.safe_load(text(ROOT / ".github/workflows/matrix.yml"))["jobs"]
    assert jobs["row"]["strategy"]["matrix"]["python"] == said


def test_every_old_name_is_in_the_migration_page() -> None:
    page = text(ROOT / "MIGRATION.md")
    rows = [f"| `cankd_hf.{old}` | {', '.join(f'`cankd_hf.{new}`' for new in MOVED[old])} |" for old in MOVED]
    rows += [f"| `{old}` | `{new}` |" for old, new in RENAMED.items()]
    assert not [row for row in rows if f"{row}\n" not in page], "add these rows to MIGRATION.md"


def test_workflows_and_forms_are_valid_and_call_what_is_there() -> None:
    for path in (ROOT / ".github").rglob("*.yml"):
        content = yaml.safe_load(text(path))
        assert "name" in content or path.name == "config.yml", path
        called = re.findall(r"\.ci/\w+", text(path))
        assert not [name for name in called if not (ROOT / name).is_file()], path
        assert "secrets." not in text(path), f"{path}: a release needs no secret"
        if path.parent.name == "workflows":
            assert content["permissions"] == {"contents": "read"} and content["jobs"], path


def test_a_release_whose_parts_do_not_agree_is_refused() -> None:
    words = [sys.executable, str(ROOT / ".ci/release"), "v9.9.9", "https://example.org/other"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1
    assert "of the tag v9.9.9" in done.stdout and f"got {REPOSITORY}" in done.stdout
