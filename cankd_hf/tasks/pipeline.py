"""Tasks whose students run in a pipeline of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from cankd_hf.tasks.base import Task

NOTE = (
    "The model code lies beside the weights. After `pip install cankd-hf` and `import cankd_hf` it loads without "
    "`trust_remote_code`."
)


def class_names(config: Mapping[str, Any]) -> list[str]:
    """Names of the classes in a config.json; empty without classes."""
    return [str(name) for name in (config.get("id2label") or {}).values()]


def listed(names: Sequence[str]) -> str:
    """The first twenty names, for a sentence."""
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


class PipelineTask(Task):
    """A task whose students run in a pipeline of transformers, which the usage code of a card calls."""

    prints: ClassVar[str]
    """What the code on a card prints of each result, beside its label."""

    @classmethod
    def call_arguments(cls, config: Mapping[str, Any]) -> str:
        """Further arguments of the pipeline's call, as code."""
        return ""

    @classmethod
    def usage(cls, config: Mapping[str, Any], name: str) -> tuple[str, str]:
        ours = bool(config.get("auto_map"))
        trust = ", trust_remote_code=True" if ours else ""
        local = not ours and str(config.get("model_type")).startswith("cankd_")
        code = (
            f"{'import cankd_hf  # knows the model' if local else ''}\n"
            "from transformers import pipeline\n\n"
            f'predict = pipeline("{cls.pipeline_tag_of(config)}", {json.dumps(name)}{trust})\n'
            f'for found in predict("photo.jpg"{cls.call_arguments(config)}):\n'
            f'    print(found["label"], {cls.prints})'
        )
        return code.lstrip(), NOTE if ours else ""

    @classmethod
    def quick_usage(cls, config: Mapping[str, Any], folder: str) -> str:
        known = config["model_type"] == "cankd_fpn"
        ours = "import cankd_hf  # or trust_remote_code=True where it is not installed\n" if known else ""
        call = f'pipeline("{cls.pipeline_tag_of(config)}", "{folder}")("photo.jpg"{cls.call_arguments(config)})'
        return f"{ours}from transformers import pipeline\n{call}"
