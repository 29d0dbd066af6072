"""The model card of a student, from recorded facts; what was not recorded is left out, never guessed."""

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from cankd_hf.hub import escape, sections
from cankd_hf.hub.facts import Facts, read_facts
from cankd_hf.hub.licences import NAMED_OTHERS, UNKNOWN, inherited, told
from cankd_hf.names import CARD_FILE

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("card_template.md")
_MARK = "<!-- written by cankd_hf "


def write_card(
    folder: str | Path,
    *,
    licence: str | None = None,
    tags: Sequence[str] = (),
    title: str | None = None,
    more: Mapping[str, Any] | None = None,
) -> Path:
    """Writes README.md beside a saved student from the files there and returns its path; an edited one is kept.

    Args:
        folder: of a run or of a checkpoint.
        licence: a Hub identifier such as `apache-2.0`; default: the recipe's `hub.license`, else the only one that the
            licences of teachers, data and first weights leave, else `unknown`.
        tags: further tags, beside the recipe's.
        title: heading; default: the folder's name.
        more: metadata beside what was recorded, see `card_data`.

    Raises:
        InputError: if a file with facts cannot be read.
    """
    file = Path(folder) / CARD_FILE
    if file.is_file() and not _is_ours(file.read_text(encoding="utf-8")):
        logger.warning("%s was changed by hand and is kept as it is; remove it to have it written anew", file)
        return file
    file.write_text(render_card(read_facts(folder), str(folder), licence, tags, title, more), encoding="utf-8")
    return file


def card_for(
    folder: Path,
    repo: str,
    stated: Mapping[str, str] | None = None,
    cleared: Sequence[str] = (),
    licence: str | None = None,
) -> str:
    """The card to push: the one beside the student, with its folder replaced by the repository's name; else a new one.

    `stated` and `cleared` are those of `check_licences`, `licence` is the student's own; a card that the run wrote
    gets the lines that follow from them. Raises InputError if a file with facts cannot be read.
    """
    file = folder / CARD_FILE
    if file.is_file():
        text, mark, rest = file.read_text(encoding="utf-8").rpartition(_MARK)
        if not mark:
            return rest
        place = json.loads(rest.rpartition(" -->")[0])["for"]
        text = text.replace(json.dumps(place), json.dumps(repo))
        facts = read_facts(folder)
        return _restated(text, facts, facts.stating(stated or {}, cleared, licence))
    facts = read_facts(folder).stating(stated or {}, cleared, licence)
    return render_card(facts, repo, title=repo.rpartition("/")[2]).rpartition(_MARK)[0]


def _restated(text: str, before: Facts, known: Facts) -> str:
    """A card with what was stated since it was written."""
    if known.hub == before.stating({}, ()).hub:
        return text
    for old, new in zip(told(before), told(known), strict=True):
        text = text.replace(f"- {escape.text(old)}\n", f"- {escape.text(new)}\n")
    own = known.hub["license"] or inherited(known)
    if own is None or own == before.hub.get("license"):
        return text
    named = f"license: other\nlicense_name: {own}\n" if own in NAMED_OTHERS else f"license: {own}\n"
    return re.sub(r"(?<=\n)license: .*\n(license_name: .*\n)?", lambda _: named, text, count=1)


def render_card(
    facts: Facts,
    name: str,
    licence: str | None = None,
    tags: Sequence[str] = (),
    title: str | None = None,
    more: Mapping[str, Any] | None = None,
) -> str:
    """The card's text; `name` is what `from_pretrained` takes, the rest as in `write_card`."""
    title = title or Path(name).name
    template = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), trim_blocks=True, keep_trailing_newline=True)
    code, code_note = facts.task.usage(facts.config, name)
    rows, table_note = sections.results_table(facts)
    text = template.render(
        metadata=card_data(facts, title, licence, tags, more or {}).to_yaml().strip(),
        title=escape.text(title),
        purpose=sections.purpose(facts),
        code=code,
        code_note=code_note,
        table=sections.markdown(rows),
        table_note=table_note,
        made=sections.made(facts),
        phases=sections.markdown(sections.phases_table(facts)),
        terms=sections.markdown(sections.terms_table(facts)),
        licences=[escape.text(line) for line in told(facts)],
        limits=sections.limits(facts),
        citation=sections.citation(facts),
    )
    mark = json.dumps({"for": name, "sha256": _digest(text)}).replace(">", "\\u003e")  # `-->` would end the comment
    return f"{text}\n{_MARK}{mark} -->\n"


def card_data(
    facts: Facts,
    title: str,
    licence: str | None = None,
    tags: Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
) -> ModelCardData:
    """The Hub's metadata.

    `base_model` lists the Hub models that the student descends from: the one whose weights it started from, then the
    teachers. The Hub has no relation for distillation; `finetune` is the nearest.

    `given` has what the caller knows beside the facts, under the names of `Trainer.create_model_card`: `language`,
    `finetuned_from` and `dataset_tags` (Hub ids), and of the scores `tasks`, `dataset` and `dataset_args`.
    """
    given = given or {}
    teachers = [facts.teacher_id(name) for name in facts.teachers]
    base = [*_several(given.get("finetuned_from")), facts.start_id, *teachers]
    base = list(dict.fromkeys(name for name in base if name is not None))
    more: dict[str, Any] = {"base_model": base, "base_model_relation": "finetune"} if base else {}
    datasets = [*_several(given.get("dataset_tags")), *([facts.dataset_id] if facts.dataset_id is not None else [])]
    if datasets:
        more["datasets"] = list(dict.fromkeys(datasets))
    if given.get("language"):
        more["language"] = given["language"]
    scores, split = sections.reached(facts)
    if scores:
        more["metrics"] = [facts.task.metrics[name].hub for name in scores]
    if scores and (facts.data.get("path") or given.get("dataset")):  # a score without its data set says nothing
        more.update(model_name=title, eval_results=_eval_results(facts, scores, split, given))
    elif unused := [key for key in ("tasks", "dataset", "dataset_args") if given.get(key)]:
        logger.warning("the card has no scores that %s could describe; left out", ", ".join(unused))
    own = ["cankd"] + (["knowledge-distillation"] if facts.teachers else [])
    own_licence = licence or facts.hub.get("license") or inherited(facts) or UNKNOWN
    if own_licence in NAMED_OTHERS:
        more["license_name"], own_licence = own_licence, "other"
    return ModelCardData(
        license=own_licence,
        library_name="transformers",
        pipeline_tag=facts.pipeline_tag,
        tags=list(dict.fromkeys([*own, *(facts.hub.get("tags") or ()), *tags])),
        **more,
    )


def _several(value: Any) -> list[Any]:
    """One value or a list of them, or None, as a list."""
    return [] if value is None else [value] if isinstance(value, str | Mapping) else list(value)


def _eval_results(facts: Facts, scores: Mapping[str, float], split: str, given: Mapping[str, Any]) -> list[EvalResult]:
    known = facts.dataset_id or Path(str(facts.data.get("path") or "")).name
    # Several tasks or data sets: each gets the scores, as in the Trainer's own card.
    tasks, names = _several(given.get("tasks")) or [facts.pipeline_tag], _several(given.get("dataset")) or [known]
    settings = (
        {"args": given["dataset_args"]} if isinstance(given.get("dataset_args"), str) else given.get("dataset_args")
    )
    return [
        EvalResult(
            task_type=task,
            dataset_type=known or name,
            dataset_name=name,
            dataset_split=split,
            dataset_revision=facts.data.get("revision") if facts.dataset_id else None,
            dataset_args=settings,
            metric_type=facts.task.metrics[metric].hub,
            metric_name=facts.task.metrics[metric].title,
            metric_value=round(value, 6),
        )
        for task in tasks
        for name in names
        for metric, value in scores.items()
    ]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _is_ours(text: str) -> bool:
    """Whether a card is unchanged since it was written, by the hash at its end."""
    body, mark, rest = text.rpartition(f"\n{_MARK}")
    if not mark:
        return False
    try:
        return json.loads(rest.rpartition(" -->")[0])["sha256"] == _digest(body)
    except (ValueError, KeyError):
        return False
