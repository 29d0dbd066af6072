"""Every notebook runs from its first cell to its last, at its smallest scale, and is committed without outputs."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


# It starts processes, from a kernel that has done nothing else.
SLOW = {"several_gpus"}
CASES = [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem in SLOW)) for path in NOTEBOOKS]


@pytest.fixture(scope="module")
def kernel() -> Iterator[Any]:
    """One kernel for all notebooks, so that what they import is imported once; each begins with an empty namespace."""
    manager = AsyncKernelManager(kernel_name="python3")
    yield manager
    if manager.has_kernel:
        asyncio.run(manager.shutdown_kernel(now=True))


@pytest.mark.parametrize("path", CASES)
def test_a_notebook_runs(path: Path, kernel: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = read(path)
    switches = [cell for cell in notebook.cells if cell.source.startswith("SCALE = ")]
    assert len(switches) == 1, "one variable switches between CPU and GPU"
    switches[0].source, changed = re.subn('^SCALE = "cpu"', 'SCALE = "test"', switches[0].source)
    assert changed == 1, "a notebook runs on any machine as it is"
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    quick = "import gc, os, cankd_hf.runs.run\ngc.freeze()  # as in conftest"
    begin = f"%reset -f\n%matplotlib inline\n{quick}\nos.chdir({str(tmp_path)!r})\ndel gc, os, cankd_hf"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(begin))
    own = {} if path.stem in SLOW else {"km": kernel}
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}, **own).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert len(outputs) > 3 and not [output for output in outputs if output.output_type == "error"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_prose_without_outputs(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell for cell in code if cell.outputs or cell.execution_count], "strip the outputs"
    prose = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    assert len(prose) >= len(code) / 2 and notebook.cells[0].source.startswith("# ")
    assert '"gpu": ' in "".join(cell.source for cell in code), "SCALE has a size for a GPU"


def test_the_notebooks_are_there() -> None:
    assert {path.stem for path in NOTEBOOKS} >= {
        "several_gpus",
        "yolo_or_coco_folder",
        "distil_in_five_minutes",
        "bring_your_own",
        "what_does_a_student_pixel_look_at",
    }
