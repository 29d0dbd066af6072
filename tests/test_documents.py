"""The commands in README, docs and recipe headers are valid."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from cankd_hf import benchmark, cache, compare, convert, evaluate, export, label, probe, push, train, visualize
from cankd_hf.compare.settings import load_comparison
from cankd_hf.config.reading import load_data_config, read_text
from cankd_hf.runs.recipe import load_recipe

ROOT = Path(__file__).parents[1]
YAML = [path for folder in ("recipes", "comparisons") for path in sorted((ROOT / folder).glob("*.yaml"))]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *YAML]
COMMAND = re.compile(r"(?:(?:python|accelerate launch[^\n`]*?) -m cankd_hf\.|^cankd )(\w+)([^\n`|]*)", re.MULTILINE)


def commands() -> list[tuple[str, str, str]]:
    """(page, module, arguments) of every command of ours in any page; continued lines are joined."""
    found = []
    for page in PAGES:
        text = re.sub(r"\\\n\s*#?", " ", page.read_text(encoding="utf-8"))
        for module, words in COMMAND.findall(text):
            words = words.split("  #")[0].split(" (")[0].split("...")[0]
            found.append((page.name, module, words.strip()))
    return found


@pytest.mark.parametrize(("page", "module", "words"), commands())
def test_commands_parse(page: str, module: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = words.replace("$seed", "1").replace("RECIPE", "recipes/quickstart.yaml").replace("CHECKPOINT", "runs/x")
    words = words.replace("section.key=value", "seed=1").replace("mine.yaml", "recipes/quickstart.yaml")
    argv = shlex.split(words)
    if not argv or argv == ["--help"]:
        return
    if module in ("train", "cache"):
        options = (cache if module == "cache" else train).parser().parse_intermixed_args(argv)
        load_recipe(options.recipe, options.overrides + _needed(options.recipe, options.overrides))
    elif module == "evaluate":
        options = evaluate.parser().parse_intermixed_args(argv)
        load_data_config(None, options.overrides or ["data.path=shapes"])
    elif module == "compare":
        options = compare.parser().parse_intermixed_args(argv)
        load_comparison(options.file, options.overrides)
    elif module in ("data", "init", "doctor", "recipes"):
        import_module(f"cankd_hf.cli.{module}").parser().parse_args(argv)
    elif module == "push":
        push.parser().parse_args(argv)
    elif module == "label":
        label.check(label.parser().parse_intermixed_args(argv))
    elif module == "probe":
        probe.check(probe.parser().parse_intermixed_args(argv))
    elif module == "convert":
        convert.parser().parse_args(argv)
    elif module == "visualize":
        visualize.parser().parse_intermixed_args(argv)
    elif module == "export":
        export.parser().parse_args(argv)
    elif module == "benchmark":
        options = benchmark._parser().parse_args(argv)
        if hasattr(options, "recipe"):
            load_recipe(options.recipe, options.overrides + _needed(options.recipe, options.overrides))
    else:
        pytest.fail(f"{page}: there is no test for commands of cankd_hf.{module}")


def _needed(recipe: str, overrides: list[str]) -> list[str]:
    """`data.path` where a recipe leaves it to the user and the sentence does not name it."""
    open_path = re.search(r"^  path: \?\?\?", read_text(recipe), re.MULTILINE)
    return ["data.path=/data"] if open_path and not any(o.startswith("data.path=") for o in overrides) else []


def test_there_are_commands_to_test() -> None:
    assert {"train", "evaluate"} <= {module for _, module, _ in commands()}
    assert len(commands()) > 20


def test_the_readme_trains_in_fifteen_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    code = next(block for block in blocks if "CanKDTrainer(" in block)
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 15, f"{len(lines)} lines"
    from .training.tiny_trainers import teacher

    # The only change: a small random teacher in place of one that has to be downloaded.
    assert code.count('"facebook/dinov2-base"') == 1
    names: dict[str, Any] = {"tiny": teacher()}
    code = code.replace('"facebook/dinov2-base"', "tiny").replace("max_steps=20", "max_steps=2, use_cpu=True")
    exec(code, names)
    assert names["trainer"].state.global_step == 2


def test_the_python_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from .training.test_objective import segmenter
    from .training.tiny_trainers import Images, student, teacher

    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.DOTALL)
    code = "\n".join(blocks)
    assert code.count("max_steps=20") == 1 and code.count("trainer.train()") == 3
    names: dict[str, Any] = {"student": student(), "train": Images(8), "dino": teacher(), "segmenter": segmenter()}
    exec(code.replace("max_steps=20", "max_steps=2, use_cpu=True"), names)
    assert [item.name for item in names["trainer"].distiller.placed] == ["L1/dino_s2t0", "L1/dino_s3t0"]
