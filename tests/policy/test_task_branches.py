"""Only a task knows its kind: no module outside of `cankd_hf/tasks/` asks which task it serves."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from .sources import PACKAGE, ROOT, imports, package_files, parsed

# Whose business a task's kind is. An architecture is what it is whatever it is trained for, so models/ may name them.
FREE = {PACKAGE / "tasks", PACKAGE / "models"}
# A table of public names by their module, in which two are classes of ours.
TABLES = {PACKAGE / "__init__.py"}
NAMES = {"segmentation", "detection", "features", "depth"}
TAGS = {"image-segmentation", "object-detection", "zero-shot-object-detection", "image-feature-extraction"}
# Parts of a class name or of a pipeline tag that tell a task.
PARTS = ("ObjectDetection", "object-detection", "Segmentation", "zero-shot", "DepthEstimation")
CLASSES = {"FPNForObjectDetection", "FPNForSemanticSegmentation", "Objects", "ShapesSource"}
TASK_CLASSES = {"DetectionTask", "FeaturesTask", "SegmentationTask"}
# What holds a task or its name.
HOLDERS = {"task", "pipeline", "pipeline_tag", "architecture", "task_name"}
ASKING = {"endswith", "startswith", "removeprefix", "removesuffix", "find", "count", "index"}
KINDS_OF = {"isinstance", "issubclass"}
ATTRIBUTES_OF = {"hasattr", "getattr"}


def tells(node: ast.AST | None) -> bool:
    """Whether an expression holds the name of a task, of a pipeline or of a task's class."""
    for inner in ast.walk(node) if node is not None else ():
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
            text = inner.value
            if text in NAMES | TAGS or any(part in text for part in PARTS):
                return True
        if (isinstance(inner, ast.Name) and inner.id in TASK_CLASSES | CLASSES) or (
            isinstance(inner, ast.Attribute) and inner.attr in TASK_CLASSES | CLASSES
        ):
            return True
    return False


def holds(node: ast.AST) -> bool:
    """Whether an expression is a task, or the name of one."""
    return (isinstance(node, ast.Name) and node.id in HOLDERS) or (
        isinstance(node, ast.Attribute) and node.attr in HOLDERS
    )


def called(node: ast.Call) -> str:
    """The last part of what is called."""
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")


def branches(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, what) of every question after the kind of a task."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and (tells(node.left) or any(map(tells, node.comparators))):
            found.append((node.lineno, "comparison"))
        elif isinstance(node, ast.Dict) and any(map(tells, node.keys)):
            found.append((node.lineno, "dictionary"))
        elif isinstance(node, ast.match_case) and tells(node.pattern):
            found.append((node.pattern.lineno, "match"))
        elif isinstance(node, ast.Subscript) and holds(node.slice) and ast.unparse(node.value) != "TASKS":
            found.append((node.lineno, "look-up"))
        elif isinstance(node, ast.Call):
            name, args = called(node), node.args
            if (
                (name in KINDS_OF and (tells(args[1]) or holds(args[0])))
                or (name in ATTRIBUTES_OF and holds(args[0]))
                or (name in ASKING and args and tells(args[0]))
                or (name == "get" and args and holds(args[0]))
            ):
                found.append((node.lineno, name))
    return found


def bound(path: Path) -> bool:
    """Whether a file may not ask."""
    return path not in TABLES and not any(path.is_relative_to(folder) for folder in FREE)


def test_nobody_asks_which_task_it_is() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for path in package_files()
        if bound(path)
        for line, what in branches(parsed(path))
    ]
    assert not wrong, "ask the task instead (a method of `Task`):\n" + "\n".join(wrong)


def test_nobody_imports_one_task() -> None:
    known = {"cankd_hf.tasks", *(f"cankd_hf.tasks.{file.stem}" for file in (PACKAGE / "tasks").glob("*.py"))}
    concrete = {f"{place}.{name}" for place in known for name in TASK_CLASSES}
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {target}"
        for path in package_files()
        if bound(path)
        for line, target in imports(path)
        if target in concrete
    ]
    assert not wrong, "take it from TASKS:\n" + "\n".join(wrong)


def test_what_all_data_share_knows_no_tasks_data() -> None:
    # layouts: what a folder holds, of whatever task; the one place that asks them is `open_set`
    shared = ("cankd_hf.data.common", "cankd_hf.data.generated", "cankd_hf.data.layouts.catalog")
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {target}"
        for path in sorted((PACKAGE / "data" / "common").glob("*.py"))
        for line, target in imports(path)
        if target.startswith("cankd_hf.data.") and not target.startswith(shared)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "code",
    [
        'if recipe.task == "detection": pass',
        'x = 1 if "Segmentation" in name else 2',
        'x = tag in ("image-segmentation", "object-detection")',
        "if kind is FeaturesTask: pass",
        'x = {"segmentation": 1, "detection": 2}[task]',
        "x = WORDS[report.task]",
        "x = WORDS.get(pipeline_tag)",
        "isinstance(model, FPNForObjectDetection)",
        "isinstance(task, tasks.DetectionTask)",
        'hasattr(self.task, "id2label")',
        'getattr(self.task, "id2label", {})',
        'x = name.endswith("ForObjectDetection")',
        'x = tag.startswith("zero-shot")',
        "match tag:\n    case 'object-detection': pass",
    ],
)
def test_a_branch_is_seen(code: str) -> None:
    assert len(branches(ast.parse(code))) >= 1


@pytest.mark.parametrize(
    "code",
    [
        'task: str = "segmentation"',
        "task, data = TASKS[recipe.task].from_data(config)",
        "x = task.greater_is_better and task.metric in scores",
        "if found.task == source.task: pass",
        'x = {"task": task.name}',
        "isinstance(dataset, ImageDataset)",
    ],
)
def test_a_question_to_the_task_is_none(code: str) -> None:
    assert branches(ast.parse(code)) == []
