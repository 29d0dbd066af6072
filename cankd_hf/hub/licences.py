"""What the licences of a student's teachers, data and first weights ask of it.

Whether a student is a derivative work of its teacher is settled by no court, and by few licences in so many words (the
OpenRAIL family counts distillation; NVIDIA's says that outputs are no derivative model). The cautious reading is taken
here: whatever a licence asks of derivative works is asked of the student. This is not legal advice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cankd_hf.errors import InputError
from cankd_hf.hub.facts import Facts, first_weights, hub_id, licence_of, read_facts
from cankd_hf.names import FACTS_FILE, TORCHVISION

UNKNOWN = "unknown"  # the Hub's identifier for an unstated licence
TIMM = "timm/"
_NESTED = 4  # teachers of teachers that are followed


@dataclass(frozen=True)
class Terms:
    """What a licence asks of a model made with the licensed one.

    Attributes:
        rule: one sentence that names the clause.
        same: the student may only be shared under one of these licences; empty: under any.
        commercial: whether commercial use is allowed.
        shared: whether derivative works may be shared at all.
    """

    rule: str
    same: tuple[str, ...] = ()
    commercial: bool = True
    shared: bool = True

    def problem(self, licence: str) -> str | None:
        """Why a student may not be shared under `licence`, if it may not."""
        if not self.shared:
            return "a derivative of it may not be shared"
        if self.same and licence not in self.same:
            return f"a derivative of it may only be shared under {' or '.join(self.same)}"
        if not self.commercial and licence not in _NON_COMMERCIAL and licence != UNKNOWN:
            return "a derivative of it may not be given away for commercial use"
        return None


def _notice(clause: str) -> Terms:
    return Terms(f"any licence, if its notices stay with copies of it ({clause})")


def _by_sa(name: str, *further: str, commercial: bool = True) -> Terms:
    use = "" if commercial else "non-commercial use only (2a1); "
    return Terms(
        f"{use}adapted material under the same licence, with attribution (3a, 3b1)", (name, *further), commercial
    )


_RAIL = Terms(
    "its use restrictions bind derivatives, which by its definitions include distilled models (4a, 5)",
    ("openrail", "openrail++", "creativeml-openrail-m", "bigscience-openrail-m", "bigscience-bloom-rail-1.0"),
)
# Hub identifier, or `license_name` of a card whose licence is `other` -> terms, by the texts of 2025 and 2026.
TERMS: dict[str, Terms] = {
    "apache-2.0": _notice("4"),
    "mit": _notice("the permission notice"),
    "bsd-2-clause": _notice("1, 2"),
    "bsd-3-clause": _notice("1, 2; no endorsement: 3"),
    "isc": _notice("the permission notice"),
    "cc0-1.0": Terms("any licence (public domain dedication, 2)"),
    "cc-by-4.0": Terms("any licence, with attribution (3a)"),
    "cc-by-sa-4.0": _by_sa("cc-by-sa-4.0", "gpl-3.0"),  # creativecommons.org lists GPL-3.0 as compatible, one way
    "cc-by-nc-4.0": Terms("non-commercial use only (2a1), with attribution (3a)", commercial=False),
    "cc-by-nc-sa-4.0": _by_sa("cc-by-nc-sa-4.0", commercial=False),
    "cc-by-nd-4.0": Terms("adapted material may be made and not shared (2a1B)", shared=False),
    "cc-by-nc-nd-4.0": Terms("adapted material may be made and not shared (2a1B)", commercial=False, shared=False),
    "gpl-3.0": Terms("the whole work under the same licence (5c)", ("gpl-3.0",)),
    "agpl-3.0": Terms(
        "the whole work under the same licence (5c), its source to users over a network (13)", ("agpl-3.0",)
    ),
    "dinov3-license": Terms(
        "derivative works only under this agreement, with a copy of it (1b i); publications acknowledge it (1b ii); "
        "no military or weapons use (1b v)",
        ("dinov3-license",),
    ),
    "fair-noncommercial-research-license": Terms(
        "non-commercial research only; derivative works only under this agreement, with a copy of it (1b i)",
        ("fair-noncommercial-research-license",),
        commercial=False,
    ),
    "nvidia-open-model-license": Terms(
        "any licence for a derivative model, within NVIDIA's Trustworthy AI terms (2, 3); copies of the model itself "
        "carry its notice"
    ),
    "nvidia-source-code-license": Terms(
        "non-commercial use only, derivative works too (3.3), which carry this use limitation (3.2)", commercial=False
    ),
    "apple-amlr": Terms("research only, its model derivatives too", ("apple-amlr",), commercial=False),
    **dict.fromkeys(_RAIL.same, _RAIL),
}  # fmt: skip
_NON_COMMERCIAL = {name for name, terms in TERMS.items() if not terms.commercial}
# Those that cards name beside `license: other`.
NAMED_OTHERS = {name for name in TERMS if name.startswith(("dinov3", "fair-", "nvidia-"))}
# Other spellings that cards use.
_ALIASES = {
    "dinov3": "dinov3-license",
    "fair-noncommercial-research": "fair-noncommercial-research-license",
    "fair-nc": "fair-noncommercial-research-license",
    "nvidia-open-model-license-agreement": "nvidia-open-model-license",
    "nvidia-open-model": "nvidia-open-model-license",
    "apache": "apache-2.0",
    "apple-ml-research-model-license": "apple-amlr",
    "bsd": "bsd-3-clause",
    "gpl": "gpl-3.0",
    "agpl": "agpl-3.0",
    "agpl-3": "agpl-3.0",
    "gpl-3": "gpl-3.0",
}


def known_name(licence: str) -> str:
    """The identifier of a licence as `TERMS` has it: `Apache License 2.0` is `apache-2.0`."""
    name = re.sub(r"[\s_]+", "-", licence.strip().lower())
    name = re.sub(r"-or-later$|-only$", "", name)
    plain = re.sub(r"-?license-?|,|-?version", "-", name).strip("-").replace("--", "-")
    tries = (name, f"{name}-license", plain, f"{plain}-license")
    return next((_ALIASES.get(one, one) for one in tries if _ALIASES.get(one, one) in TERMS), name)


@dataclass(frozen=True)
class Source:
    """What a student comes from.

    Attributes:
        name: a Hub id, or a folder.
        role: `teacher`, `first weights` or `data`.
        licence: as stated by the user or its card; None: not known.
    """

    name: str
    role: str
    licence: str | None

    @property
    def terms(self) -> Terms | None:
        """What its licence asks, if the licence is known here."""
        return None if self.licence is None else TERMS.get(self.licence)


def sources(facts: Facts, stated: Mapping[str, str] | None = None) -> list[Source]:
    """The teachers, data sets and first weights a student comes from, with their licences.

    What the run made itself (random weights, generated images, a teacher trained in the same run) is left out; for
    a teacher that was trained with this package, its own sources are named instead. `stated` has licences by name
    where no card tells them; they are preferred to a card's.
    """
    given = {**(facts.hub.get("licenses") or {}), **(stated or {})}
    found: dict[str, Source] = {}
    for role, name, revision in _named(facts, _NESTED):
        licence = given.get(name) or _looked_up(role, name, revision)
        found.setdefault(name, Source(name, role, None if licence is None else known_name(licence)))
    return list(found.values())


def _looked_up(role: str, name: str, revision: str | None) -> str | None:
    if name.startswith(TORCHVISION):
        return "bsd-3-clause"
    licence = licence_of(name, revision, "dataset" if role == "data" else "model")
    if licence is None and name.startswith(TIMM):  # timm knows that of its weights, without the Hub
        licence = getattr(_timm_weights(name), "license", None)
    return None if licence in (UNKNOWN, "other") else licence


def _timm_weights(name: str) -> Any:
    """What timm knows of `timm/NAME` or `timm/NAME.TAG`; None for a name that it does not know."""
    from timm.models import get_pretrained_cfg

    try:
        return get_pretrained_cfg(name.removeprefix(TIMM))
    except RuntimeError:
        return None


def _named(facts: Facts, depth: int) -> Iterator[tuple[str, str, str | None]]:
    """Role, name and revision of each source."""
    student = facts.recipe.get("student") or {}
    start = first_weights(student) or str(facts.run.get("start") or "")
    yield from _of_model("first weights", start, student.get("revision"), depth)
    for name, manifest in facts.teachers.items():
        model, section = str(manifest.get("model") or ""), facts.section_of(name)
        if section.get("fit") is not None or section.get("adapt") is not None:  # trained in the same run, from this
            start = first_weights(section)
            yield from _of_model("first weights of the teacher", start, section.get("revision"), depth)
            continue
        known = hub_id(model) is not None or model.startswith((TORCHVISION, TIMM))
        if not known and section.get("model"):  # of a local path only the last part is recorded
            model = str(section["model"])
        local = bool(manifest.get("local"))
        yield from _of_model("teacher", model, manifest.get("revision"), depth, local)
    unlabelled = hub_id(facts.data.get("unlabelled"))
    for path, revision in ((facts.dataset_id, facts.data.get("revision")), (unlabelled, None)):
        if path is not None:
            yield "data", path, revision


def _of_model(
    role: str, model: str, revision: str | None, depth: int, local: bool = False
) -> Iterator[tuple[str, str, str | None]]:
    """A model as a source, or the sources of one that was trained with this package; none for random weights."""
    if model.startswith(TIMM) and "." not in model:  # the weights that timm takes by default
        model = getattr(_timm_weights(model), "hf_hub_id", None) or model
    if hub_id(model) is not None or model.startswith((TORCHVISION, TIMM)):
        yield role, model, revision
    elif model and (Path(model) / FACTS_FILE).is_file() and depth:
        whose = "first weights" if role == "first weights" else "teacher"
        for inner, of, its in _named(read_facts(model), depth - 1):
            yield inner if " of the " in inner else f"{inner} of the {whose}", of, its
    elif local or "/" in model or (model and Path(model).is_dir()):
        yield role, model, None


def told(facts: Facts, stated: Mapping[str, str] | None = None) -> list[str]:
    """A line for each source of a student, for its card: name, role, licence, and what that asks."""
    cleared, lines = set(facts.hub.get("cleared") or ()), []
    for source in sources(facts, stated):
        if source.licence is None:
            said = "its licence is not known"
        else:
            said = f"{source.licence}: {source.terms.rule if source.terms else 'its terms are not listed here'}"
        note = "; used by a permission of its own, as the publisher states" if source.name in cleared else ""
        public = hub_id(source.name) is not None or source.name.startswith((TORCHVISION, TIMM))
        name = source.name if public else f"local {Path(source.name).name}"  # where it lies is nobody's business
        lines.append(f"{name} ({source.role}): {said}{note}")
    return lines


def inherited(facts: Facts) -> str | None:
    """The only licence under which a student may be shared, where its sources leave just one; those that are used by a
    permission of their own leave any."""
    binding = [source.terms for source in sources(facts) if source.name not in (facts.hub.get("cleared") or ())]
    bound = [set(terms.same) for terms in binding if terms and terms.same]
    left = set.intersection(*bound) if bound else set()
    return left.pop() if len(left) == 1 else None


def check_licences(
    facts: Facts,
    licence: str,
    stated: Mapping[str, str] | None = None,
    cleared: Sequence[str] = (),
    owner: str | None = None,
) -> None:
    """Raises InputError if a student may not be shared under `licence`, or the licence of a source is not known.

    Args:
        facts: of the student.
        licence: its own, a Hub identifier; `unknown` where none is stated.
        stated: licences of sources whose cards state none.
        cleared: sources that are used by a permission of their own, beside those of `hub.cleared`.
        owner: under whose name the student is shared: what is theirs and states no licence asks for none.
    """
    spared = {*cleared, *(facts.hub.get("cleared") or ())}
    ours, problems, found = known_name(licence), list[str](), sources(facts, stated)
    names = [source.name for source in found]
    for place, given in (("licenses", {*(facts.hub.get("licenses") or {}), *(stated or {})}), ("cleared", spared)):
        problems += [
            f"hub.{place}: expected what the student comes from ({', '.join(names) or 'nothing'}), got {name!r}; "
            "correct the name, or leave it out"
            for name in sorted(given - {*names})
        ]
    for source in found:
        what = f"licence of {source.name} ({source.role})"
        fix = f"state it once: hub.licenses: {{{source.name}: apache-2.0}} (or --license-of {source.name}=apache-2.0)"
        permission = f"or, with a permission of your own, hub.cleared: [{source.name}] (or --cleared {source.name})"
        if source.name in spared or (source.licence is None and owner and source.name.startswith(f"{owner}/")):
            continue
        if source.licence is None:
            problems.append(f"{what}: expected a licence in its card, got none that can be read; {fix}, {permission}")
        elif source.terms is None:
            listed = f"expected one whose terms are known here, got {source.licence!r}"
            problems.append(f"{what}: {listed}; read it and name the one that is nearest to it, {fix}, {permission}")
        elif problem := source.terms.problem(ours):
            why = f"{source.licence}, {source.terms.rule}"
            got = "none" if ours == UNKNOWN else ours
            fix = "change the student's licence (hub.license or --license)"
            problems.append(f"{what}: {problem}, got {got}: {why}; {fix}, {permission}")
    if problems:
        raise InputError(problems)
