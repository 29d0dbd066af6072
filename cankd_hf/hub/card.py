"""The card of a student: facts in, README.md out. What was not recorded is left out, never guessed."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from cankd_hf.hub.facts import Facts, licence_of, read_facts
from cankd_hf.hub.files import CARD_FILE
from cankd_hf.hub.sections import (
    citation,
    limits,
    made,
    markdown,
    purpose,
    reached,
    results_table,
    terms_table,
)

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("card_template.md")
_MARK = "<!-- written by cankd_hf "
# The Hub's word for a licence that nobody has stated.
UNKNOWN = "unknown"


def write_card(
    folder: str | Path, *, licence: str | None = None, tags: Sequence[str] = (), title: str | None = None
) -> Path:
    """Writes README.md beside a saved student from the files there; one that a person has changed is kept.

    Args:
        folder: of a run or of a checkpoint.
        licence: the student's licence, a Hub identifier such as `apache-2.0`; where not given what the recipe says
            under `hub:`, else `unknown`.
        tags: further tags, beside the recipe's.
        title: heading; the folder's name where not given.

    Returns:
        The card's path.

    Raises:
        InputError: if a file with facts cannot be read.
    """
    file = Path(folder) / CARD_FILE
    if file.is_file() and not _is_ours(file.read_text(encoding="utf-8")):
        logger.warning("%s was changed by hand and is kept as it is; remove it to have it written anew", file)
        return file
    file.write_text(render_card(read_facts(folder), str(folder), licence, tags, title), encoding="utf-8")
    return file


def card_for(folder: Path, repo: str) -> str:
    """The card to push: the one beside the student, its folder replaced by the repository's name; else a new one.

    Raises:
        InputError: if a file with facts cannot be read.
    """
    file = folder / CARD_FILE
    if not file.is_file():
        return render_card(read_facts(folder), repo, title=repo.rpartition("/")[2]).rpartition(_MARK)[0]
    text, mark, rest = file.read_text(encoding="utf-8").rpartition(_MARK)
    if not mark:
        return rest
    place = json.loads(rest.rpartition(" -->")[0])["for"]
    return text.replace(json.dumps(place), json.dumps(repo))


def render_card(
    facts: Facts, name: str, licence: str | None = None, tags: Sequence[str] = (), title: str | None = None
) -> str:
    """The card's text.

    Args:
        facts: from `read_facts`.
        name: what `from_pretrained` takes: a Hub id or a folder.
        licence: see `write_card`.
        tags: see `write_card`.
        title: see `write_card`.
    """
    title = title or Path(name).name
    template = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), trim_blocks=True, keep_trailing_newline=True)
    code, code_note = facts.task.usage(facts.config, name)
    rows, table_note = results_table(facts)
    text = template.render(
        metadata=card_data(facts, title, licence, tags).to_yaml().strip(),
        title=title,
        purpose=purpose(facts),
        code=code,
        code_note=code_note,
        table=markdown(rows),
        table_note=table_note,
        made=made(facts, licence_of(facts.teacher_id, facts.teacher.get("revision"))),
        terms=markdown(terms_table(facts)),
        limits=limits(facts),
        citation=citation(facts),
    )
    mark = json.dumps({"for": name, "sha256": _digest(text)})
    return f"{text}\n{_MARK}{mark} -->\n"


def card_data(facts: Facts, title: str, licence: str | None = None, tags: Sequence[str] = ()) -> ModelCardData:
    """The Hub's metadata.

    `base_model` lists the Hub models that the student descends from: the one whose weights it started from, then the
    teacher. The Hub knows four relations and none for distillation; `finetune` is the nearest, the text is exact.
    """
    base = list(dict.fromkeys(name for name in (facts.start_id, facts.teacher_id) if name is not None))
    more: dict[str, Any] = {}
    if base:
        more.update(base_model=base, base_model_relation="finetune")
    if facts.dataset_id is not None:
        more["datasets"] = [facts.dataset_id]
    scores, split = reached(facts)
    if scores:
        more["metrics"] = [facts.task.metrics[name].hub for name in scores]
    if scores and facts.data.get("path"):  # a score without its data set says nothing
        more.update(model_name=title, eval_results=_eval_results(facts, scores, split))
    own = ["cankd"] + (["knowledge-distillation"] if facts.teacher else [])
    return ModelCardData(
        license=licence or facts.hub.get("license") or UNKNOWN,
        library_name="transformers",
        pipeline_tag=facts.pipeline_tag,
        tags=list(dict.fromkeys([*own, *(facts.hub.get("tags") or ()), *tags])),
        **more,
    )


def _eval_results(facts: Facts, scores: dict[str, float], split: str) -> list[EvalResult]:
    name = facts.dataset_id or Path(str(facts.data["path"])).name
    return [
        EvalResult(
            task_type=facts.pipeline_tag,
            dataset_type=name,
            dataset_name=name,
            dataset_split=split,
            dataset_revision=facts.data.get("revision") if facts.dataset_id else None,
            metric_type=facts.task.metrics[metric].hub,
            metric_name=facts.task.metrics[metric].title,
            metric_value=round(value, 6),
        )
        for metric, value in scores.items()
    ]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _is_ours(text: str) -> bool:
    """Whether a card is as it was written: a hash at its end tells."""
    body, mark, rest = text.rpartition(f"\n{_MARK}")
    if not mark:
        return False
    try:
        return json.loads(rest.rpartition(" -->")[0])["sha256"] == _digest(body)
    except (ValueError, KeyError):
        return False
