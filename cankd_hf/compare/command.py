"""`python -m cankd_hf.compare FILE`: the command line."""

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cankd_hf.commands import command_parser, console, exit_code, importing
from cankd_hf.durations import duration
from cankd_hf.errors import InputError

if TYPE_CHECKING:
    from cankd_hf.compare.planning import Planner
    from cankd_hf.compare.verdict import Findings

EXAMPLES = """examples:
  python -m cankd_hf.compare comparisons/camvid.yaml recipe.data.path=/data/camvid --plan
  python -m cankd_hf.compare comparisons/camvid.yaml recipe.data.path=/data/camvid
  python -m cankd_hf.compare comparisons/camvid.yaml recipe.data.path=/data/camvid seeds=3 --jobs 2

exit codes: 0 done, 2 bad input, 3 some runs failed (they are named; the same command tries them again), 130 stopped
(the same command continues)"""
FAILED = 3


def parser() -> argparse.ArgumentParser:
    """The command line, without importing anything heavy."""
    description = "Compare arms of one recipe, paired by seed, at equal steps and at equal cost."
    made = command_parser("compare", description, EXAMPLES)
    made.add_argument("file", help="YAML file; every key is explained in docs/compare.md")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the file")
    made.add_argument(
        "--plan", action="store_true", help="print the plan with its estimated time; train and write nothing"
    )
    made.add_argument(
        "--report", action="store_true", help="write the tables of what was run so far, also while it runs"
    )
    made.add_argument("--jobs", type=int, default=1, metavar="N", help="runs side by side: devices or shares of cores")
    made.add_argument(
        "--no-plan", action="store_true", help="start without measuring steps first, where all budgets are in steps"
    )
    made.add_argument(
        "--calibrate",
        metavar="FILE",
        help="measure what a step of each arm costs, for budgets[].prices; train nothing",
    )
    made.add_argument("--any-code", action="store_true", help="also take records of the same recipe by other code")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns the exit code."""
    options = parser().parse_intermixed_args(argv)
    kept = "what was finished is kept, and the same command continues from it"
    return exit_code(lambda: _run(options), kept if options.calibrate is None else "no prices were written")


def _run(options: argparse.Namespace) -> int:
    from cankd_hf.compare.settings import load_comparison

    if not 1 <= options.jobs <= 1024:
        raise InputError(f"--jobs: expected a number from 1 to 1024, got {options.jobs}")
    config = load_comparison(options.file, options.overrides)
    with importing():
        from cankd_hf.compare.arms import build_arms
        from cankd_hf.compare.execute import Processes, calibrated, complete
        from cankd_hf.compare.planning import Planner
        from cankd_hf.compare.records import Records
        from cankd_hf.compare.report import write
        from cankd_hf.compare.verdict import judge
        from cankd_hf.training.checkpoint_files import check_folder
        from cankd_hf.training.lock import FolderLock

    out = Path(config.output_dir)
    folder = Path(config.records) if config.records else out / "records"
    reading = options.plan or options.report or options.calibrate is not None
    records = Records(folder, out / "runs", options.any_code, config.clock == "wall", fixed=reading)
    shown = console(160)

    def say(line: str) -> None:
        shown.print(line, soft_wrap=True, highlight=False)

    with ExitStack() as held:
        if not options.plan and options.calibrate is None:
            check_folder(out)
        if not reading:  # records of one folder may belong to several comparisons
            check_folder(folder, "records")
            for place in (out, folder):
                held.enter_context(FolderLock(place))
        planner = Planner(config, build_arms(config, records), records)
        processes = Processes(records, options.jobs, _costs_count(planner, options.no_plan))
        if options.calibrate is not None:
            return _write_prices(Path(options.calibrate), planner, processes, say)
        planner.sweep()
        measured = options.plan or not (options.report or options.no_plan)
        if planner.unfinished and measured:
            try:
                calibrated(planner, processes.calibrate, say)
            except BaseException:
                processes.end()
                raise
        if options.plan or (planner.unfinished and measured):
            _print_plan(planner, options.jobs, say)
        if options.plan:
            return 0
        if planner.unfinished and not options.report:
            complete(planner, processes.run, options.jobs, say, processes.end)
        planner.sweep()
        findings = judge(planner)
        title = f"Comparison {Path(options.file).stem}"
        write(title, findings, planner, out)
    _print_tables(shown, findings, planner)
    say(f"Page, Markdown and JSON: {out / 'comparison.html'}")
    return FAILED if planner.failed or any(one.failed for one in planner.outcomes.values()) else 0


def _costs_count(planner: "Planner", no_plan: bool) -> bool:
    """Whether what runs spend counts, which no run beside others on its device can tell."""
    costs = any(budget.measured for budget in planner.budgets)
    if no_plan and costs:
        raise InputError(
            "--no-plan: budgets of cost need the cost of a step, which is measured; leave it out, or name prices"
        )
    return costs


def _write_prices(file: Path, planner: "Planner", processes: Any, say: Any) -> int:
    """Measures a step of each arm and writes what it costs. Returns the exit code."""
    from cankd_hf.compare.prices import PRECISION, saved
    from cankd_hf.runs.record import write_json

    arms = {name: arm for name, arm in planner.arms.items() if not arm.follows}
    say(f"measuring the cost of a step of {len(arms)} arms, in turn")
    try:
        found = saved(processes.calibrate(arms, PRECISION, say), arms, planner.records)
    except BaseException:
        processes.end()
        raise
    for name, cost in found["arms"].items():
        told = (
            f"{cost[unit]:.4f} {unit.replace('_', ' ')} (± {error:.1%})"
            for unit, error in found["errors"][name].items()
        )
        say(f"{name}: {', '.join(told)}")
    for name, wrong in found["failed"].items():
        say(f"{name}: failed: {wrong}")
    write_json(file, found)
    say(f"Prices: {file}")
    return FAILED if found["failed"] else 0


def _print_plan(planner: "Planner", jobs: int, say: Any) -> None:
    from cankd_hf.compare.estimate import estimate

    plan = estimate(planner)
    if not plan.lines:
        say("Nothing is left to run.")
        return
    say(f"Plan of {len(planner.arms)} arms, {len(planner.config.all_seeds)} seeds, {len(planner.budgets)} budgets:")
    for line in plan.lines:
        say(f"  {line}")
    if plan.seconds:
        side = f", {jobs} side by side" if jobs > 1 else ""
        say(f"Estimated time: {duration(plan.seconds / jobs)} for {plan.runs} runs{side}.")


def _print_tables(shown: Any, findings: "Findings", planner: "Planner") -> None:
    from rich.table import Table

    from cankd_hf.compare.report import cells, columns, notes, off_budget

    for found in findings.tables:
        table = Table(title=f"{findings.metric} ({findings.split}), {found.budget}", title_justify="left")
        for name in columns(findings, found):
            table.add_column(name)
        for row in found.rows:
            table.add_row(*cells(row))
        shown.print(table)
        for sentence in [*found.said, *off_budget(found)]:
            shown.print(f"- {sentence}", soft_wrap=True, highlight=False)
    for note in notes(findings, planner):
        shown.print(note, soft_wrap=True, highlight=False)
