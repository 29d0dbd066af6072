"""The `hub:` section of a recipe. Does not import transformers, so that recipes are checked quickly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from cankd_hf.config.schema import Section

# Key of the section -> the setting of `training:` with the same meaning.
SETTINGS = {
    "push": "push_to_hub",
    "id": "hub_model_id",
    "private": "hub_private_repo",
    "strategy": "hub_strategy",
    "revision": "hub_revision",
}


@dataclass
class HubConfig(Section):
    """The `hub:` section: whether and where the student of a run is pushed, and metadata of its card.

    Attributes:
        push: whether the student is pushed; false only sets metadata of the card.
        id: repository, such as `me/my-student`; by default the name of `output_dir`, under your own account.
        private: whether a repository is private if it is created.
        strategy: when to push: at the `end`, also at `every_save`, or also checkpoints in folders of their own
            (`checkpoint`: only the newest, `all_checkpoints`: all).
        revision: branch to push to; by default `main`.
        license: the student's licence as a Hub identifier, such as `apache-2.0`; by default the only one that the
            licences of teachers, data and first weights leave, else `unknown`.
        licenses: the licences of teachers, data sets and first weights whose cards state none: name -> Hub identifier.
        cleared: teachers, data sets and first weights whose licence does not bind the student, by a permission of
            your own; the card says so.
        tags: additional tags of the card.
    """

    place: ClassVar[str] = "hub"

    push: bool = True
    id: str | None = None
    private: bool = True
    strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] = "end"
    revision: str | None = None
    license: str | None = None
    licenses: dict[str, str] = field(default_factory=dict)
    cleared: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)

    def settings(self) -> dict[str, Any]:
        """The same as settings of `TrainingArguments`."""
        if not self.push:
            return {}
        given = {setting: getattr(self, key) for key, setting in SETTINGS.items()}
        return {setting: value for setting, value in given.items() if value is not None}

    def clashes(self, training: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Keys that contradict `training:`: key and message of each."""
        for key, setting in SETTINGS.items():
            ours = self.settings().get(setting, False if key == "push" else None)
            if setting in training and training[setting] != ours:
                yield key, f"says {ours!r}, but training.{setting} says {training[setting]!r}; keep one of them"
