"""Tables of docs/recipes.md and docs/compare.md from dataclasses; `python -m tests.recipe_tables` updates them."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any, get_type_hints

from cankd_hf.compare.settings import BudgetConfig, ComparisonConfig, ScreenConfig, TuningConfig, VerdictConfig
from cankd_hf.config.advice import describe
from cankd_hf.config.data import DepthConfig, StrongConfig
from cankd_hf.config.distill import DistillConfig, Guard, LossTerm
from cankd_hf.config.hub import HubConfig
from cankd_hf.config.phases import Phase
from cankd_hf.config.recipe import Recipe
from cankd_hf.config.teacher import CacheConfig
from cankd_hf.losses import LOSSES
from cankd_hf.models.fpn.configuration_cankd_fpn import FPNConfig
from cankd_hf.training.arguments import CanKDConfig

PAGE = Path(__file__).resolve().parents[1] / "docs" / "recipes.md"
COMPARISONS = PAGE.with_name("compare.md")


def meanings(cls: Any) -> dict[str, str]:
    """Name -> text of the `Attributes:` or `Args:` part of a docstring, on one line."""
    found: dict[str, str] = {}
    part, name = False, ""
    for line in (inspect.getdoc(cls) or "").splitlines():
        if re.fullmatch(r"(Attributes|Args):", line):
            part = True
        elif part and (entry := re.match(r"    (\w+): (.*)", line)):
            name = entry[1]
            found[name] = entry[2]
        elif part and line.startswith("        ") and name:
            found[name] += " " + line.strip()
        elif part and line and not line.startswith(" "):
            part = False
    return found


def row(key: str, kind: str, default: str, meaning: str) -> str:
    """One line of a table."""
    return f"| `{key}` | {kind} | {default} | {meaning.replace('|', chr(92) + '|')} |"


def default_of(field: dataclasses.Field[Any]) -> str:
    """A field's default as YAML shows it."""
    if field.default is not dataclasses.MISSING:
        return shown(field.default)
    if field.default_factory is dataclasses.MISSING:
        return "required"
    value = field.default_factory()
    return shown(value) if isinstance(value, list | dict) and not _holds_objects(value) else "see below"


def shown(value: Any) -> str:
    """A default as YAML writes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = "[" + ", ".join(map(str, value)) + "]" if isinstance(value, list | tuple) else str(value)
    return f"`{text}`" if text else '`""`'


def _holds_objects(value: list[Any] | dict[str, Any]) -> bool:
    return any(dataclasses.is_dataclass(item) for item in value)


def table(cls: Any, section: str) -> str:
    """Every key of one section."""
    hints, texts = get_type_hints(cls, include_extras=True), meanings(cls)
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(cls):
        kind = describe(hints[field.name]).replace("a section of `key: value` lines", "section")
        lines.append(row(f"{section}{field.name}", kind, default_of(field), texts[field.name]))
    return "\n".join(lines)


def signature_table(function: Any, doc: Any, leave_out: set[str]) -> str:
    """Every parameter of a constructor."""
    texts = meanings(doc)
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in leave_out | {"self", "kwargs"}:
            assert name in texts, f"{doc.__name__}: describe {name} under `Args:` in the docstring"
            lines.append(f"| `{name}` | {shown(parameter.default)} | {texts[name]} |")
    return "\n".join(lines)


def loss_table() -> str:
    """Every loss in one line: what it reads, what it is, and its paper."""
    lines = ["| loss | compares | what | paper |", "|---|---|---|---|"]
    for name, loss in LOSSES.items():
        (what,) = (line for line in (inspect.getdoc(loss) or "").splitlines()[:1])
        paper = f"[{loss.paper}](https://arxiv.org/abs/{loss.paper})"
        lines.append(f"| `{name}` | {loss.reads} | {what.replace('|', chr(92) + '|')} | {paper} |")
    return "\n".join(lines)


def own_training_table() -> str:
    """What `CanKDConfig` adds to or changes in TrainingArguments."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    own = CanKDConfig.__annotations__
    for field in dataclasses.fields(CanKDConfig):
        if field.name in own:
            lines.append(f"| `training.{field.name}` | {default_of(field)} | {field.metadata['help']} |")
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """Marker in the page -> table."""
    hints = get_type_hints(Recipe)
    teacher = next(kind for kind in hints["teacher"].__args__ if dataclasses.is_dataclass(kind))
    made = {
        "recipe": table(Recipe, ""),
        "data": table(hints["data"], "data."),
        "strong": table(StrongConfig, "data.strong."),
        "depth": table(DepthConfig, "data.depth."),
        "student": table(hints["student"], "student."),
        "fpn": signature_table(FPNConfig.__init__, FPNConfig, {"backbone_config", "semantic_loss_ignore_index"}),
        "teacher": table(teacher, "teacher."),
        "cache": table(CacheConfig, "teacher.cache."),
        "distill": table(DistillConfig, "distill."),
        "term": table(LossTerm, "distill.terms.N."),
        "guard": table(Guard, "distill.guard."),
        "phase": table(Phase, "phases.N."),
        "training": own_training_table(),
        "hub": table(HubConfig, "hub."),
    }
    for name, loss in LOSSES.items():
        made[f"loss {name}"] = signature_table(loss.__init__, loss, {"channels", "num_labels"})
    made["losses"] = loss_table()
    return made


def comparison_tables() -> dict[str, str]:
    """The tables of docs/compare.md."""
    return {
        "comparison": table(ComparisonConfig, ""),
        "budgets": table(BudgetConfig, "budgets.N."),
        "tuning": table(TuningConfig, "tuning."),
        "screen": table(ScreenConfig, "screen."),
        "verdict": table(VerdictConfig, "verdict."),
    }


def rendered(page: str, made: dict[str, str]) -> str:
    """The page with every `<!-- table NAME -->` ... `<!-- end -->` part made anew."""
    name = "docs/recipes.md" if "recipe" in made else "docs/compare.md"

    def fill(match: re.Match[str]) -> str:
        return f"<!-- table {match[1]} -->\n{made.pop(match[1])}\n<!-- end -->"

    page = re.sub(r"<!-- table ([\w ]+) -->\n.*?<!-- end -->", fill, page, flags=re.DOTALL)
    assert not made, f"{name}: add `<!-- table NAME -->` and `<!-- end -->` lines for {sorted(made)}"
    return page


if __name__ == "__main__":
    for path, content in ((PAGE, tables()), (COMPARISONS, comparison_tables())):
        path.write_text(rendered(path.read_text(encoding="utf-8"), content), encoding="utf-8")
