"""Which room may look into which: read from the imports, so a wrong dependency fails before anyone reviews it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .sources import PACKAGE, ROOT, circles, edges, imports, module_name, package_files

# Lower numbers know nothing of higher ones; rooms of level 1 know nothing of each other.
LEVELS = {
    "_autoregister": 0,  # waits for transformers to be imported, then calls models.register()
    "_moved": 0,  # old module names, as text
    "durations": 0,
    "errors": 0,
    "json_text": 0,
    "names": 0,
    "quiet": 0,
    "run_lengths": 0,
    "tokens": 0,
    "commands": 1,
    "config": 1,
    "host": 1,
    "losses": 2,
    "features": 2,
    "models": 2,
    "data": 2,
    "metrics": 2,
    "teachers": 3,
    "tasks": 3,
    "hub": 4,  # below the trainer, which pushes through it; it asks the tasks for what cards say
    "training": 5,
    "figures": 6,
    "runs": 7,
    "visualize": 8,
    "benchmark": 8,
    "export": 8,
    "label": 8,
    "probe": 8,
    "convert": 8,
    "cli": 9,
    "compare": 10,  # over everything that trains one run
    "train": 10,
    "cache": 10,
    "evaluate": 10,
    "recipes": 10,
    "doctor": 10,
    "init": 10,
    "push": 10,
    "__main__": 11,
    "": 11,  # cankd_hf/__init__.py
}
# What a room may know beside those below it, each with its reason.
EXCEPTIONS = {
    ("", "_autoregister"),
    ("_autoregister", "models"),  # the one thing it does, when transformers asks for it
    ("tasks", "training"),  # statistics of a batch read the distiller's measurements (types only)
    ("export", "benchmark"),  # clocks: forms that take turns
}
LIGHT = ("torch", "transformers", "torchvision", "datasets", "timm", "evaluate", "accelerate", "matplotlib")


def room(module: str) -> str:
    """`cankd_hf.losses.cankd` -> `losses`; the package itself -> ``; what `python -m` runs -> `__main__`."""
    return "__main__" if module.endswith(".__main__") else (module.split(".") + [""])[1]


def test_every_module_has_a_level() -> None:
    unknown = {room(module_name(path)) for path in package_files()} - LEVELS.keys()
    assert not unknown, f"{sorted(unknown)} have no level: add them to LEVELS, thinking of who may use them"


def test_no_room_looks_up() -> None:
    wrong = []
    for path in package_files():
        own = room(module_name(path))
        for line, target in imports(path):
            if target.split(".")[0] != "cankd_hf":
                continue
            other = room(target)
            if own == "" or other == own or (own, other) in EXCEPTIONS:
                continue
            if other == "" or other not in LEVELS:  # a public name taken from the package: that is level 6
                other = ""
            if LEVELS[other] >= LEVELS[own]:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {own} ({LEVELS[own]}) imports {target}")
    assert not wrong, "\n".join(wrong)


def foreign_imports(subpackage: str, allowed: set[str]) -> list[str]:
    """Imports of a subpackage from other distributions than the allowed ones."""
    return [
        f"{path.relative_to(ROOT)}:{line}: {target}"
        for path in package_files()
        if room(module_name(path)) == subpackage
        for line, target in imports(path)
        if target.split(".")[0] not in allowed
    ]


def test_models_know_only_torch_and_transformers() -> None:
    allowed = {"torch", "torchvision", "transformers", "timm", "huggingface_hub", "safetensors", "cankd_hf"}
    allowed |= set(sys.stdlib_module_names)
    assert not foreign_imports("models", allowed)


def test_shipped_model_code_is_self_contained() -> None:
    """The .py files saved beside an exported student must run where cankd_hf is not installed."""
    wrong = []
    for path in sorted((PACKAGE / "models" / "fpn").glob("*.py")):
        if path.name == "__init__.py":
            continue
        for line, target in imports(path):
            if target.startswith("cankd_hf") and not target.startswith("cankd_hf.models.fpn."):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {target}")
    assert not wrong, "\n".join(wrong)


def test_losses_know_only_torch() -> None:
    allowed = {"torch", "cankd_hf", *sys.stdlib_module_names}
    assert not foreign_imports("losses", allowed)


def test_config_imports_nothing_heavy() -> None:
    """A recipe is told its mistakes of structure at once: not even a function of config/ imports torch."""
    allowed = {"annotated_types", "cankd_hf", "pydantic", "yaml", *sys.stdlib_module_names}
    assert not foreign_imports("config", allowed)


def test_importing_the_package_is_light(tmp_path: Path) -> None:
    code = f"import sys; import cankd_hf; print([m for m in {LIGHT!r} if m in sys.modules])"
    env_path = {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env_path, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]", "import cankd_hf must stay fast: import these where they are needed"


def test_no_module_imports_itself_over_others() -> None:
    """Not even inside a function or for type checking: what knows each other belongs together, or knows too much."""
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]], "the search finds none"
    assert circles(edges()) == []
