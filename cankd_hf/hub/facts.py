"""What is recorded about a student: written by the trainer, read again from its folder for the card."""

import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HTTPError
from transformers.utils import CONFIG_NAME

from cankd_hf.config.reading import read_saved
from cankd_hf.hub.files import read_json
from cankd_hf.json_text import to_json
from cankd_hf.names import CARD_FILE, FACTS_FILE, RECIPE_FILE, RESULTS_FILE, TORCHVISION
from cankd_hf.tasks import Task, recorded_task

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass
class Facts:
    """All that a card may say; what was not recorded is empty and left out of the card."""

    config: dict[str, Any]  # the student's config.json
    run: dict[str, Any]  # what the trainer recorded, distillation.json
    results: dict[str, Any]  # what the run measured, results.json
    recipe: dict[str, Any]  # the resolved one

    @property
    def teachers(self) -> dict[str, dict[str, Any]]:
        """Manifest of each teacher by name; the only one is called `teacher`."""
        one = self.run.get("teacher")
        return self.run.get("teachers") or ({"teacher": one} if one else {})

    @property
    def start_id(self) -> str | None:
        """The Hub model whose weights the student started from, where it did."""
        return hub_id(first_weights(self.recipe.get("student") or {}) or self.run.get("start"))

    def section_of(self, teacher: str) -> dict[str, Any]:
        """The recipe's section of a teacher; empty without one."""
        sections = self.recipe.get("teachers") or {"teacher": self.recipe.get("teacher")}
        return sections.get(teacher) or {}

    def teacher_id(self, teacher: str) -> str | None:
        """The Hub model that a teacher is, or, where it was trained in the same run, whose weights it started from."""
        section = self.section_of(teacher)
        if section.get("fit") is not None:
            return hub_id(first_weights(section))
        return hub_id(self.teachers[teacher].get("model"))

    @property
    def dataset_id(self) -> str | None:
        """The data set on the Hub, if it is there."""
        return hub_id(self.data.get("path"))

    @property
    def data(self) -> dict[str, Any]:
        """The recipe's data section."""
        return self.recipe.get("data") or {}

    @property
    def hub(self) -> dict[str, Any]:
        """The recipe's hub section: licence and tags."""
        return self.recipe.get("hub") or {}

    def stating(self, licences: Mapping[str, str], cleared: Sequence[str], own: str | None = None) -> "Facts":
        """The same with licences of sources, sources with a permission of their own, and the student's own licence, as
        they were stated since."""
        hub = {**self.hub, "licenses": {**(self.hub.get("licenses") or {}), **licences}}
        hub["cleared"] = [*(self.hub.get("cleared") or ()), *cleared]
        hub["license"] = own or self.hub.get("license")
        return replace(self, recipe={**self.recipe, "hub": hub})

    @property
    def task(self) -> type[Task]:
        """The student's task."""
        return recorded_task(self.run, self.config)

    @property
    def pipeline_tag(self) -> str:
        """The Hub's name of the task."""
        return self.run.get("pipeline_tag") or self.task.pipeline_tag_of(self.config)


def read_facts(folder: str | Path) -> Facts:
    """Reads what the files beside a student say about it. Raises InputError for a file that cannot be read."""
    folder = Path(folder)
    recipe = folder / RECIPE_FILE
    settings = read_saved(recipe) if recipe.is_file() else {}
    config, run, results = (read_json(folder / name) for name in (CONFIG_NAME, FACTS_FILE, RESULTS_FILE))
    return Facts(config, run, results, settings)


def planned_facts(recipe: dict[str, Any]) -> Facts:
    """What a recipe says of a student that is not made yet."""
    named = recipe.get("teachers") or {"teacher": recipe.get("teacher")}
    teachers = {name: section for name, section in named.items() if section}
    return Facts({}, {"teachers": teachers}, {}, recipe)


def first_weights(section: Mapping[str, Any]) -> str:
    """The model, or backbone, from which a `student` or `teacher` section says that training starts; "" for none."""
    config, backbone = section.get("config"), section.get("backbone")
    if isinstance(config, dict):
        backbone = backbone or config.get("backbone_config") or config
    if isinstance(backbone, dict):
        backbone = backbone.get("pretrained")
    return str(section.get("model") or backbone or "")


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Writes what the trainer recorded beside the student."""
    (folder / FACTS_FILE).write_text(to_json(facts), encoding="utf-8")


def hub_id(name: object) -> str | None:
    """`name` if it can be a repository on the Hub and is not a local folder."""
    text = str(name or "")
    # timm/x is an architecture; weights on the Hub have a tag: timm/x.y
    if text.startswith(TORCHVISION) or (text.startswith("timm/") and "." not in text):
        return None
    return text if _HUB_ID.fullmatch(text) and not Path(text).exists() else None


@cache
def licence_of(model: str | None, revision: str | None = None, kind: str = "model") -> str | None:
    """The licence in the card of a model (or a `dataset`); None where the card cannot be read or names none."""
    if model is None:
        return None
    try:
        file = Path(model) / CARD_FILE
        if not file.is_file():
            file = Path(hf_hub_download(model, CARD_FILE, revision=revision, repo_type=kind, etag_timeout=5))
        card = ModelCard.load(file)
    except (HfHubHTTPError, HTTPError, EntryNotFoundError, OSError, ValueError, yaml.YAMLError, RecursionError):
        return None  # offline, gated, without a card, or with one that is none
    licence = card.data.get("license")
    if licence in (None, "other"):  # only then the name counts
        licence = card.data.get("license_name") or licence
    return licence if isinstance(licence, str) and re.fullmatch(r"[\w .,+()/-]{1,100}", licence) else None


def hardware(device: torch.device) -> str:
    """Name of the machine: `NVIDIA H200`, `CPU (x86_64, 2 threads, 4 cores)`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        used = "1 thread" if threads == 1 else f"{threads} threads"
        return f"CPU ({platform.machine()}, {used}, {os.cpu_count()} cores)"
    return device.type
