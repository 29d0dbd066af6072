"""How a student is used that a pipeline of transformers knows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

NOTE = (
    "The model code lies beside the weights. After `pip install cankd-hf` and `import cankd_hf` it loads without "
    "`trust_remote_code`."
)


def class_names(config: Mapping[str, Any]) -> list[str]:
    """Names of the classes that a config.json holds; none where it holds none."""
    return [str(name) for name in (config.get("id2label") or {}).values()]


def listed(names: Sequence[str]) -> str:
    """Names in a sentence, the first twenty."""
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


def pipeline_usage(config: Mapping[str, Any], tag: str, name: str, prints: str, words: str = "") -> tuple[str, str]:
    """The lines of a card, and a remark on them.

    Args:
        config: the student's config.json.
        tag: the pipeline's name.
        name: what `from_pretrained` takes.
        prints: what to print of each thing that was found, beside its label.
        words: further arguments of the pipeline's call.
    """
    ours = bool(config.get("auto_map"))
    trust = ", trust_remote_code=True" if ours else ""
    local = not ours and str(config.get("model_type")).startswith("cankd_")
    code = (
        f"{'import cankd_hf  # knows the model' if local else ''}\n"
        "from transformers import pipeline\n\n"
        f'predict = pipeline("{tag}", {json.dumps(name)}{trust})\n'
        f'for found in predict("photo.jpg"{words}):\n'
        f'    print(found["label"], {prints})'
    )
    return code.lstrip(), NOTE if ours else ""


def quick_pipeline_usage(config: Mapping[str, Any], tag: str, folder: str, words: str = "") -> str:
    """The lines that a run prints at its end; arguments as those of `pipeline_usage`."""
    known = config["model_type"] == "cankd_fpn"
    ours = "import cankd_hf  # or trust_remote_code=True where it is not installed\n" if known else ""
    return f'{ours}from transformers import pipeline\npipeline("{tag}", "{folder}")("photo.jpg"{words})'
