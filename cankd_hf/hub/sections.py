"""The sections of a card, one function each, from recorded facts only."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cankd_hf.durations import duration
from cankd_hf.hub import escape
from cankd_hf.hub.facts import Facts, hub_id, licence_of
from cankd_hf.losses import LOSSES, OWN_LOSSES, loss_named
from cankd_hf.names import ALONE, DISTILLED, EMA, RAW, STUDENT, TEACHER, TORCHVISION

# Rows of the result table, in their order.
_ROWS = (ALONE, STUDENT, DISTILLED, TEACHER)


def purpose(facts: Facts) -> str:
    """What the student is for, in one sentence."""
    size = f" of {facts.run['parameters']:,} parameters" if "parameters" in facts.run else ""
    teachers = " and ".join(_teacher_name(facts, name) for name in facts.teachers)
    source = f"distilled from {teachers}" if teachers else "trained without a teacher"
    return facts.task.purpose(facts.config, size, source)


def reached(facts: Facts) -> tuple[dict[str, float], str]:
    """The student's scores that tables show, and the split they were measured on; empty where not measured."""
    arms = facts.results.get("arms") or []
    if arms:
        return _known(facts, arms[-1].get("scores") or {}), str(facts.results.get("split", "test"))
    return _known(facts, facts.run.get("scores") or {}), "validation"


def _known(facts: Facts, scores: dict[str, Any]) -> dict[str, float]:
    values = {name: scores[name] for name in facts.task.metrics if isinstance(scores.get(name), (int, float))}
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}


def results_table(facts: Facts) -> tuple[list[list[str]], str]:
    """The table of student alone, student and teacher, as far as they were measured, and a note on it."""
    scores, split = reached(facts)
    if not scores:
        return [], ""
    run = facts.run
    student = {"name": "student", "parameters": run.get("parameters"), "steps": run.get("step")}
    arms = facts.results.get("arms") or [{**student, "scores": run["scores"]}]
    arms = sorted(arms, key=lambda arm: _ROWS.index(arm["name"]) if arm["name"] in _ROWS else len(_ROWS))
    rows = [["model", "parameters", "steps", *(facts.task.metrics[name].title for name in scores)]]
    for arm in arms:
        known = _known(facts, arm.get("scores") or {})
        sizes = [f"{arm[key]:,}" if arm.get(key) else "" for key in ("parameters", "steps")]
        name = arm["name"] + (" †" if arm.get("inherited") else "")
        rows.append([name, *sizes, *(f"{known[key]:.4f}" if key in known else "" for key in scores)])
    seed = f" with seed {run['seed']}" if "seed" in run else ""
    note = f"Scores of the {escape.text(split)} split, from one run{seed}."
    if any(arm.get("inherited") for arm in arms):
        note += " † starts with parts of the teacher's weights."
    return rows, note + _gap(facts)


def _gap(facts: Facts) -> str:
    """How much distillation improved the score, in one sentence; empty where it was not measured."""
    gap = facts.results.get("gap_closed")
    if gap is None:
        return ""
    metric = facts.task.metrics[facts.results["metric"]].title
    if gap < 0:
        side = "below" if facts.task.greater_is_better else "above"
        return f" Distillation did not help here: the distilled student is {side} the student alone in {metric}."
    if gap < 0.005:
        return f" Distillation brought nothing in {metric} here: student alone and distilled student are level."
    return f" Distillation closed {gap:.0%} of the gap in {metric} between the student alone and the teacher."


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table, header first, numbers aligned to the right; empty without rows."""
    if not rows:
        return ""
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    cells = [[escape.text(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:]))


def made(facts: Facts, licences: bool = True) -> list[tuple[str, str]]:
    """How the student was trained, as (heading, text); `licences`: look up the teachers' licences."""
    run, lines = facts.run, []
    if facts.start_id:
        lines.append(("Start", f"the weights of {_link(facts.start_id)}"))
    for name in facts.teachers:
        heading = f"Teacher {escape.text(name)}" if len(facts.teachers) > 1 else "Teacher"
        lines.append((heading, _teacher(facts, name, licences)))
    if run.get("inherited"):
        lines.append(
            ("Inherited", f"started with the teacher's weights in {escape.text(', '.join(run['inherited']))}")
        )
    if (data := _data(facts)) is not None:
        lines.append(("Data", data))
    if "task_weight" in run and facts.teachers:
        lines.append(("Loss", f"{run['task_weight']:g} x task loss + the distillation losses in the table below"))
    if run.get("step"):
        planned = f" of {run['planned_steps']:,} planned" if run.get("planned_steps", 0) > run["step"] else ""
        lines.append(
            (
                "Training",
                f"{run['step']:,} steps{planned}, batch {run['batch_size']}, learning rate {run['learning_rate']:g}, "
                f"{escape.text(run['precision'])}, seed {run['seed']}",
            )
        )
    if "hardware" in run:
        several = f"{run['processes']} x " if run.get("processes", 1) > 1 else ""
        time = f"; {duration(run['seconds'])} of training" if "seconds" in run else ""
        lines.append(("Machine", f"{several}{escape.text(run['hardware'])}{time}"))
    if run.get("ema"):
        lines.append(("Weights", escape.text(ema_line(run["ema"]))))
    working = (facts.results.get("arms") or [{}])[-1].get("working") or run.get("working") or {}
    if working.get("verdict"):
        lines.append(("Is it working?", escape.text(working["line"])))
    if working.get("weights"):
        lines.append(("Weights of the terms", escape.text(working["weights"])))
    if "energy" in run:
        watt_hours = run["energy"]["joules"] / 3600
        lines.append(("Energy", f"{watt_hours:,.1f} Wh, measured by: {escape.text(run['energy']['measured'])}"))
    if "versions" in run:
        lines.append(
            ("Software", ", ".join(escape.text(f"{name} {version}") for name, version in run["versions"].items()))
        )
    if facts.recipe:
        lines.append(("Recipe", "every setting is in [recipe.yaml](recipe.yaml), which `cankd_hf.train` takes"))
    return lines


def ema_line(choice: Mapping[str, Any]) -> str:
    """Which weights a student of a run with `training.ema` has, the last ones or their average, and by what scores."""
    what = {
        RAW: "the last weights",
        EMA: f"the average of the weights over the steps (EMA, decay {choice['decay']:.6g})",
    }
    chosen = choice["chosen"]
    if not choice["on"]:
        return f"{what[chosen]}; {choice['why']}"
    metric, other = choice["metric"], RAW if chosen == EMA else EMA
    scores = {name: found.get(metric, math.nan) for name, found in choice["scores"].items()}
    return f"{what[chosen]}, chosen on validation: {metric} {scores[chosen]:.4f}; {what[other]}: {scores[other]:.4f}"


def _teacher(facts: Facts, name: str, licences: bool) -> str:
    manifest = facts.teachers[name]
    model, revision = hub_id(manifest.get("model")), manifest.get("revision")
    parts = [_link(model) if model else _teacher_name(facts, name)]
    if revision:
        parts.append(f"revision {escape.code(revision)}")
    if licences and (licence := licence_of(model, revision)):
        parts.append(f"licence {escape.text(licence)}")
    if "parameters" in manifest:
        parts.append(f"{manifest['parameters']:,} parameters up to its last tap")
    if manifest.get("taps"):
        parts.append("taps " + ", ".join(map(escape.code, manifest["taps"])))
    return ", ".join(parts)


def _teacher_name(facts: Facts, name: str) -> str:
    manifest = facts.teachers[name]
    model, kind = manifest.get("model"), escape.text(manifest.get("class", "model"))
    if hub_id(model):
        return escape.text(model)
    if str(model).startswith(TORCHVISION):
        return escape.code(model)
    if model == "random weights":
        return f"a {kind} with random weights"
    if facts.section_of(name).get("fit") is not None:
        start = facts.teacher_id(name)
        return f"a {kind} trained in the same run" + (f" from the weights of {escape.text(start)}" if start else "")
    return f"a local {kind}" + (
        f" ({escape.code(model)})" if model not in (None, "", manifest.get("class", "model")) else ""
    )


def _data(facts: Facts) -> str | None:
    path = facts.data.get("path")
    if not path:
        return None
    name = _link(facts.dataset_id, "datasets/") if facts.dataset_id else f"local data {escape.code(Path(path).name)}"
    if path == "shapes":
        name = "generated images of overlapping shapes"
    parts = [name]
    if facts.dataset_id and facts.data.get("revision"):
        parts.append(f"revision {escape.code(facts.data['revision'])}")
    splits = (facts.results.get("facts") or {}).get("splits") or {}
    names = {"train": "training", "eval": "validation"}
    parts += [f"{count:,} {names.get(role, role)} images" for role, count in splits.items() if count]
    more = (facts.results.get("facts") or {}).get("unlabelled") or {}
    if facts.data.get("unlabelled"):
        parts.append(f"{more['images']:,} images without labels" if more.get("images") else "images without labels")
    if facts.data.get("crop_size"):
        parts.append("crops of {} x {}".format(*facts.data["crop_size"]))
    if facts.data.get("image_size"):
        fit = "within" if facts.data.get("keep_aspect") else "at"
        parts.append(f"scored {fit} {{}} x {{}}".format(*facts.data["image_size"]))
    return ", ".join(parts)


def _link(name: str, kind: str = "") -> str:
    return f"[{escape.text(name)}](https://huggingface.co/{kind}{name})"


def terms_table(facts: Facts) -> list[list[str]]:
    """Each distillation loss at each pair of levels, with its weight; for CanKD also the paper's mu.

    A loss whose teacher maps are conditioned says so, and so does one whose weight is a share of the gradient.
    """
    terms = facts.run.get("terms") or []
    if not terms:
        return []
    several = len(facts.teachers) > 1
    rows = [["distillation loss", *(["teacher"] * several), "student stride", "teacher stride", "weight", "mu"]]
    for term in terms:
        for pair in term["pairs"]:
            # The authors' loss has the factor 0.5 outside mu, ours inside the loss.
            by_share = "share" in term
            mu = f"{pair['weight'] / 2:g}" if term["loss"] == "cankd" and not by_share else ""
            weight = f"{term['share']:.0%} of the gradient" if by_share else f"{pair['weight']:g}"
            name = f"{term['name']} ({term['conditioning']})" if "conditioning" in term else term["name"]
            read = [pair.get(f"{side}_stride") for side in ("student", "teacher")]
            strides = ["logits" if stride is None else f"{stride:.3g}" for stride in read]
            teacher = [term.get("teacher") or ""] if several else []
            rows.append([name, *teacher, *strides, weight, mu])
    return rows


def phases_table(facts: Facts) -> list[list[str]]:
    """The phases of the training, with the steps, cost and score of each; empty for one that had none."""
    phases = facts.run.get("phases") or []
    if not phases:
        return []
    metric = facts.task.metric
    rows = [["phase", "losses", "frozen", "steps", "cost", facts.task.metrics[metric].title]]
    for phase in phases:
        losses = [*(["task"] if phase["task_weight"] else []), *phase["terms"]]
        cost, score = phase.get("cost_share"), (phase.get("scores") or {}).get(metric)
        last = [f"{phase['steps']:,}", "" if cost is None else f"{cost:.0%}", "" if score is None else f"{score:.4f}"]
        rows.append([phase["name"], " + ".join(losses), ", ".join(phase["frozen"]), *last])
    return rows


def limits(facts: Facts) -> list[str]:
    """Known limits of the student, as far as the facts show them."""
    findings = facts.results.get("findings") or facts.run.get("teacher_findings") or []
    said = [f"{finding[:1].upper()}{finding[1:]}." for finding in findings] + facts.task.limits(facts.config)
    said = [escape.text(limit) for limit in said]
    if facts.data.get("path") == "shapes":
        said.append("The images are a generated toy set: it is of no use on photographs.")
    elif facts.data.get("path"):
        said.append(
            "It has seen the images above only; how it does on other cameras, places or subjects was not measured."
        )
    scores, _ = reached(facts)
    if not scores:
        said.append("No score was recorded for these weights.")
    else:
        said.append("The scores come from one run; how far another seed would be from them is not known.")
    if facts.teachers:
        whose = "its teachers" if len(facts.teachers) > 1 else "its teacher"
        said.append(f"What is wrong with {whose} may be wrong with it.")
    return said


def citation(facts: Facts) -> str:
    """BibTeX of CanKD and of the other losses that were used."""
    used = [term["loss"] for term in facts.run.get("terms") or []]
    names = dict.fromkeys(["cankd", *(name for name in used if name in LOSSES or name in OWN_LOSSES)])
    return "\n".join(dict.fromkeys(loss_named(name).citation for name in names))
