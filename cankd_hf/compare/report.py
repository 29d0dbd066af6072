"""What a comparison leaves: one table for a console, Markdown and a page, its JSON, and the page itself."""

import base64
import itertools
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from cankd_hf.compare.arms import Arm
from cankd_hf.compare.origin import code_hash
from cankd_hf.compare.planning import Planner
from cankd_hf.compare.plots import curve_plot, difference_plot
from cankd_hf.compare.records import TABLES_FILE, Record
from cankd_hf.compare.settings import BudgetConfig
from cankd_hf.compare.verdict import Findings, Row, Table, interval_text
from cankd_hf.figures import render_page, to_png
from cankd_hf.hub import escape
from cankd_hf.runs.record import write_json, write_text

JSON_FILE, MARKDOWN_FILE, PAGE_FILE = "comparison.json", "comparison.md", "comparison.html"
TEMPLATE = Path(__file__).with_name("comparison.html")
STRONG = "data.strong."
STEPS = tuple(f"training.{key}_steps" for key in ("max", "eval", "save", "logging"))
COLUMNS = ("arm", "scores by seed", "mean", "minus {reference}", "95% bootstrap", "claim", "steps", "{unit}", "runs")


def columns(findings: Findings, table: Table) -> list[str]:
    """The heads of a table's columns."""
    unit = table.unit.replace("_seconds", " s").upper().replace(" S", " s")
    return [name.format(reference=table.reference, unit=unit) for name in COLUMNS]


def cells(row: Row) -> list[str]:
    """One line of a table."""
    scores = " ".join("-" if score is None else f"{score:.4f}" for score in row.scores.values())
    gain, reference = row.gain, row.gain is None
    boot = "-" if gain is None or gain.pairs < 2 else f"[{gain.boot_low:+.4f}, {gain.boot_high:+.4f}]"
    return [
        f"{row.arm} ({row.control})" if row.control and row.control not in row.arm else row.arm,
        scores,
        "-" if row.mean != row.mean else f"{row.mean:.4f}",
        "" if reference else interval_text(gain),
        "" if reference else boot,
        row.claim,
        _range(list(row.steps.values())),
        _range(list(row.charged.values())),
        str(row.tried),
    ]


def _range(values: Sequence[float]) -> str:
    """The smallest and the largest, to three digits where they are seconds."""
    ends = (
        [f"{end:.{0 if isinstance(end, int) or end >= 100 else 1}f}" for end in (min(values), max(values))]
        if values
        else []
    )
    return " to ".join(dict.fromkeys(ends)) or "-"


def notes(findings: Findings, planner: Planner) -> list[str]:
    """What a reader of the tables has to know, one sentence each."""
    config, records = planner.config, [one.record for one in planner.outcomes.values() if one.record is not None]
    told = [
        f"Scores are {findings.metric} of the {findings.split} split. Differences are paired by seed: the same "
        "initial weights and images. In brackets the 95% paired-t interval, which decides; beside it the bootstrap."
    ]
    if config.images == "labelled":
        told.append("Arms train on the same labels of people; those of a teacher are an arm's own, and charged to it.")
    tuning = config.tuning
    if tuning is not None and tuning.eval_split is not None:
        told.append(f"Trials were scored on {tuning.eval_split}, and trained without {tuning.left_out or 'it'}.")
    if config.images == "own":
        told.append("Arms train on images of their own: a learning curve, from which nothing is claimed of a method.")
    told += [*_claiming(findings, planner), *_pricing(planner)]
    if config.screen is not None:
        told.append(
            f"Arms were screened on {config.screen.seeds} of the seeds by their validation scores; the test split was "
            "not looked at for that."
        )
    for arm, trial in planner.tuned.items():
        tuned = f"learning rate {trial.learning_rate:g}, weights times {trial.weight:g}"
        told.append(f"Tuned, {arm}: {tuned}, the best of {config.tuning.trials if config.tuning else 0} trials.")
    if edges := _at_edges(planner):
        told.append(f"The best learning rate of {', '.join(edges)} is the smallest or the largest that was tried.")
    for name, seconds in _teaching(planner).items():
        charged = "charged" if config.charge_teacher else "not charged"
        told.append(f"Training the teacher of {name} took {seconds:.0f} s, {charged}.")
    for name, (seconds, what) in _prepaid(planner).items():
        told.append(f"Before each run of {name}, {seconds:.0f} s were spent ({what}), charged in full.")
    if any(arm.distils and not arm.teachers for arm in planner.arms.values()):
        told.append("What it cost to train the teachers is not known here, and not charged.")
    for name, shares in _shares(planner).items():
        listed = ", ".join(f"{term} {share:.0%}" for term, share in shares.items())
        told.append(f"Share of the gradient at the taps, {name}: {listed} (mean over its runs).")
    for name, verdicts in _working(planner).items():
        counts = ", ".join(f"{kind} in {count}" for kind, count in verdicts.items())
        told.append(f"Is it working? {name}: {counts} of {sum(verdicts.values())} runs.")
    if more := [name for name, arm in planner.arms.items() if arm.recipe.data.unlabelled and arm.distils]:
        told.append(f"Images without labels are seen by {', '.join(more)} beside those that all arms see.")
    told += overdone(planner)
    chosen = [name for name, arm in planner.arms.items() if _chosen_by_its_score(arm)]
    if chosen:
        told.append(
            f"WARNING: load_best_model_at_end or ema chose the weights of {', '.join(chosen)} by the split that is "
            "scored, which flatters them: a screening may do so, a result may not."
        )
    machines = sorted({str(sorted(record.machine.items())) for record in records if record.machine})
    if len(machines) > 1:
        told.append(f"WARNING: runs come from {len(machines)} different machines; their costs do not compare.")
    others = {record.code for record in records} - {code_hash()}
    if others:
        told.append(f"WARNING: some runs were made by other code ({', '.join(sorted(others))}).")
    return told


def _claiming(findings: Findings, planner: Planner) -> list[str]:
    """What a claim needs, and what none of them says."""
    judged, told = planner.config.judged, []
    if judged is None:
        return []
    told.append(
        "A claim needs an interval beyond 0 and the threshold "
        f"({judged.threshold:g}), and to pass Holm's procedure over all questions of its table (each arm "
        "against the reference, and against the control without a block), so that a table without any true "
        "difference makes a false claim in at most 1 of 20 cases."
    )
    if (count := len(findings.tables)) > 1:
        told.append(f"Each of the {count} tables is judged by itself: in all of them it is at most {count} of 20.")
    if all(budget.cost is None for budget in planner.budgets):
        told.append("All budgets are in steps: nothing here says what a gain costs, nor what training longer reaches.")
    return told


def _pricing(planner: Planner) -> list[str]:
    """What equal cost means where costs are prices, and what the runs really spent."""
    told = []
    for budget in planner.budgets:
        if (prices := planner.prices_of(budget)) is None:
            continue
        before = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in prices.before.items() if seconds)
        given = f"; labels of a teacher and its stored answers are in them, in full: {before}" if before else ""
        known = f", known to {max(prices.errors.values()):.1%}" if prices.errors else ""
        told.append(
            f"Priced ({budget.label}): costs are steps times what a step of each arm cost on another occasion "
            f"({prices.where}; {prices.file}{known}), not measured run by run. What a run spends once, before its "
            f"first step, is taken as equal and left out{given}."
        )
        if spent := _spent(planner, budget, prices.unit):
            listed = ", ".join(f"{name} {fmean(real):.0f} ({price:.0f})" for name, (price, real) in spent.items())
            unit = prices.unit.replace("_", " ")
            told.append(f"What the runs of {budget.label} really spent, in {unit}, beside their price: {listed}.")
    return told


def _spent(planner: Planner, budget: BudgetConfig, unit: str) -> dict[str, tuple[float, list[float]]]:
    """The price of the runs of each arm, and what each really spent after its start, where the same clock says it."""
    found: dict[str, tuple[float, list[float]]] = {}
    for (name, label, _), outcome in planner.outcomes.items():
        made = outcome.record
        if label == budget.label and made is not None and made.unit == unit and not made.beside:
            found.setdefault(name, (outcome.charged, []))[1].append(made.spent - made.setup + made.before)
    return found


def overdone(planner: Planner) -> list[str]:
    """A warning for each arm whose student learns its task worse in training than one that differs in `data.strong`
    alone, and has less of it: the augmentation is too strong for it."""
    runs: dict[str, dict[Any, Record]] = {}
    for (name, *place), outcome in planner.outcomes.items():
        if outcome.record is not None and outcome.record.task_loss is not None:
            runs.setdefault(name, {})[tuple(place)] = outcome.record
    told = []
    for strong, weak in itertools.permutations(runs, 2):
        pairs = [
            (runs[strong][place].task_loss, runs[weak][place].task_loss)
            for place in runs[strong].keys() & runs[weak].keys()
            if _stronger(runs[strong][place].settings, runs[weak][place].settings)
        ]
        losses = [fmean(values) for values in zip(*pairs, strict=True)]  # type: ignore[type-var]
        if losses and losses[0] > losses[1]:
            told.append(
                f"WARNING: the task's loss in training is {losses[0]:.4g} in {strong} and {losses[1]:.4g} in {weak}, "
                "which differs in data.strong alone: its augmentation is too strong for this student; lower "
                "data.strong.strength."
            )
    return told


def _stronger(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two resolved recipes differ in `data.strong` alone, and the first has more of it."""
    left_out = (STRONG, *STEPS)  # at equal cost arms have steps of their own
    plain = [{key: value for key, value in each.items() if not key.startswith(left_out)} for each in (one, other)]
    order = ["none", "unlabelled", "all"]
    ranks = [
        (order.index(each.get(f"{STRONG}images", "none")), each.get(f"{STRONG}strength") or 0.0)
        for each in (one, other)
    ]
    return plain[0] == plain[1] and ranks[0] > ranks[1]


def _chosen_by_its_score(arm: Arm) -> bool:
    """Whether the weights were chosen by the split that is scored: a checkpoint, or the average (EMA) or not."""
    data, chooses = arm.recipe.data, arm.recipe.training.get
    final = data.eval_split if data.test_split is None else data.test_split
    return (
        bool(chooses("load_best_model_at_end") or chooses("ema") not in (None, False, "off"))
        and final == data.eval_split
    )


def _at_edges(planner: Planner) -> list[str]:
    """Arms whose best learning rate is an end of what was tried, beyond which a better one may lie."""
    rates = planner.config.tuning.learning_rate if planner.config.tuning is not None else []
    ends = {min(rates), max(rates)} if len(rates) > 1 else set()
    return [name for name, trial in planner.tuned.items() if trial.learning_rate in ends]


def _teaching(planner: Planner) -> dict[str, float]:
    """Seconds of training a teacher, under the names of the arms that it has."""
    found: dict[str, tuple[list[str], float]] = {}
    for name, arm in planner.arms.items():
        if arm.teachers and not arm.follows and (seconds := planner.taught(arm)):
            found.setdefault("".join(run.key for run in arm.teachers), ([], seconds))[0].append(name)
    return {", ".join(names): seconds for names, seconds in found.values()}


def _prepaid(planner: Planner) -> dict[str, tuple[float, str]]:
    """What was spent before the runs of each arm whose costs are measured, at most, and on what."""
    found: dict[str, tuple[float, str]] = {}
    measured = {budget.label for budget in planner.budgets if budget.cost is not None and budget.prices is None}
    for (name, label, _), one in planner.outcomes.items():
        if label in measured and one.record is not None and one.record.before > found.get(name, (0.0, ""))[0]:
            found[name] = one.record.before, ", ".join(one.record.prepaid)
    return found


def _shares(planner: Planner) -> dict[str, dict[str, float]]:
    """The share of the gradient that each term of an arm had, mean over its runs: 0 is a weight of nothing."""
    found: dict[str, dict[str, list[float]]] = {}
    for (name, *_), one in planner.outcomes.items():
        for term, share in one.record.shares.items() if one.record is not None else ():
            found.setdefault(name, {}).setdefault(term, []).append(share)
    return {name: {term: fmean(shares) for term, shares in terms.items()} for name, terms in found.items()}


def _working(planner: Planner) -> dict[str, Counter[str]]:
    """How often each verdict was given on the distillation of each arm."""
    found: dict[str, Counter[str]] = {}
    runs = {
        (name, one.record.key): one.record for (name, *_), one in planner.outcomes.items() if one.record is not None
    }
    for (name, _), record in runs.items():
        if record.working:
            found.setdefault(name, Counter())[record.working] += 1
    return found


def off_budget(table: Table) -> list[str]:
    """A sentence for each arm that missed its budget, or has no score."""
    told = []
    for row in table.rows:
        if row.off:
            seeds = ", ".join(f"seed {seed}: {share:+.0%}" for seed, share in row.off.items())
            told.append(f"{row.arm} is off its budget ({seeds}).")
        told += [f"{row.arm}: {reason}." for reason in row.failed]
    return told


def markdown(findings: Findings, planner: Planner) -> str:
    """The tables for docs and cards."""
    parts = []
    for table in findings.tables:
        head = [escape.text(name) for name in columns(findings, table)]
        lines = [f"### {escape.text(table.budget)}", "", _line(head), _line(["---"] * len(head))]
        lines += [_line([escape.text(cell) for cell in cells(row)]) for row in table.rows]
        said = [*table.said, *off_budget(table)]
        lines += ["", *(f"- {escape.text(sentence)}" for sentence in said)] if said else []
        parts.append("\n".join(lines))
    told = "\n".join(f"- {escape.text(note)}" for note in notes(findings, planner))
    return "\n\n".join([*parts, told]) + "\n"


def _line(words: Sequence[str]) -> str:
    return f"| {' | '.join(words)} |"


def as_json(findings: Findings, planner: Planner) -> dict[str, Any]:
    """Everything in the tables, and the records they come from."""
    found = asdict(findings)
    for table in found["tables"]:
        for row in table["rows"]:
            row["mean"] = statistics.fmean(known) if (known := _known(row["scores"])) else None
            row["runs"] = {
                seed: one.record.key
                for (name, label, seed), one in planner.outcomes.items()
                if name == row["arm"] and label == table["budget"] and one.record is not None
            }
    return {
        **found,
        "notes": notes(findings, planner),
        "tuned": {name: vars(trial) for name, trial in planner.tuned.items()},
        "calibration": planner.calibration.get("arms", {}),
        "code": code_hash(),
        "comparison": asdict(planner.config),
    }


def _known(scores: dict[int, float | None]) -> list[float]:
    return [score for score in scores.values() if score is not None]


def page(title: str, findings: Findings, planner: Planner) -> str:
    """One HTML file with everything in it."""
    judged = planner.config.judged
    figures = {
        "Differences": difference_plot(findings, judged.threshold if judged is not None else 0.0),
        "Learning curves over cost": curve_plot(findings),
    }
    images = {
        name: base64.b64encode(to_png(figure)).decode() for name, figure in figures.items() if figure is not None
    }
    return render_page(
        TEMPLATE,
        title=title,
        tables=[
            (table, columns(findings, table), [cells(row) for row in table.rows], off_budget(table))
            for table in findings.tables
        ],
        notes=notes(findings, planner),
        images=images,
    )


def write(title: str, findings: Findings, planner: Planner, folder: Path) -> None:
    """Writes JSON, Markdown and page into the folder of the comparison; and what its records show beside these, where
    they have a folder of their own and there are any, to be committed with them."""
    made, text = as_json(findings, planner), markdown(findings, planner)
    write_json(folder / JSON_FILE, made)
    write_text(folder / MARKDOWN_FILE, text)
    kept = {key: made[key] for key in ("metric", "split", "greater_is_better", "unit", "tables", "notes", "tuned")}
    if planner.config.records is not None and any(
        score is not None for table in findings.tables for row in table.rows for score in row.scores.values()
    ):
        write_json(planner.records.folder / TABLES_FILE, {**kept, "markdown": text})
    write_text(folder / PAGE_FILE, page(title, findings, planner))
