"""`python -m cankd_hf.init [FILE]`: five questions, and a commented recipe with its plan."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cankd_hf.commands import check_file, command_parser, console, exit_code, importing
from cankd_hf.config.advice import not_one_of
from cankd_hf.config.named import reachable
from cankd_hf.errors import InputError
from cankd_hf.host import Host, cpu_bf16, read_host, usable_cores, wait_passively
from cankd_hf.quiet import told_already

if TYPE_CHECKING:
    from cankd_hf.cli.looking import Seen
    from cankd_hf.cli.starting import Answers

EXAMPLES = """examples:
  python -m cankd_hf.init
  python -m cankd_hf.init mine.yaml --data /data/mine
  python -m cankd_hf.init mine.yaml --data /data/mine --device phone --teacher dinov2-small --hours 2 --yes
  python -m cankd_hf.init mine.yaml --data /data/mine --student /models/resnet18 --teacher /models/resnet50 --yes

It looks at the data and the machine for its defaults, writes a recipe in which every line says why, and prints what
running it will take. docs/plan.md explains the choices.

exit codes: 0 the recipe is written, 2 bad input (nothing is written)"""
FLAGS = ("data", "task", "device", "teacher", "hours")
# Models of a recipe: the option that names another one, and its key.
MODELS = {"--student": "student.backbone", "--teacher": "teacher.model"}
LOOKED_AT = 64  # images of each split
SPENT = 0.9  # of the hours: the rest is for starting, saving and what other programs take


def parser() -> argparse.ArgumentParser:
    """The command line, without importing anything heavy."""
    made = command_parser("init", "Ask five questions and write a commented recipe.", EXAMPLES)
    made.add_argument("file", nargs="?", default="recipe.yaml", metavar="FILE", help="to write (default: recipe.yaml)")
    made.add_argument("--data", metavar="FOLDER", help="a folder, parquet file or Hub data set")
    made.add_argument("--task", help="what is learned: segmentation, detection, features, ...")
    made.add_argument("--device", help="what the student must run on: phone, cpu, edge or server")
    made.add_argument("--student", metavar="FOLDER_OR_ID", help="its backbone (default: one for the device)")
    made.add_argument("--teacher", help="none, dinov2-small, dinov2-base, a folder with a model, or a Hub id")
    made.add_argument("--hours", help="that training may take on this machine")
    made.add_argument("--yes", action="store_true", help="take the default of every question that has no option")
    made.add_argument("--force", action="store_true", help="write over a file that is there")
    made.add_argument("--no-measure", action="store_true", help="guess the number of steps; loads no model")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns the exit code."""
    options = parser().parse_args(argv)
    return exit_code(lambda: _run(options), "nothing was written")


def _run(options: argparse.Namespace) -> int:
    file = Path(options.file)
    if os.path.lexists(file) and not options.force:
        raise InputError(f"FILE: {file} is there already; name another one, or add --force to write over it")
    check_file(file, "FILE")
    missing = [f"--{name}" for name in FLAGS if getattr(options, name) is None]
    if missing and not options.yes and not sys.stdin.isatty():
        raise InputError(f"init: expected a terminal to ask in, got none; give {' '.join(missing)}, or --yes")
    host = read_host()
    wait_passively(host)
    with importing():
        from cankd_hf.cli.data import wrapped
        from cankd_hf.cli.starting import recipe_text
        from cankd_hf.runs.recipe import parse_recipe
        from cankd_hf.runs.threads import settle_threads
        from cankd_hf.training.checkpoint_files import writing
    asked = _Asked(options, interactive=sys.stdin.isatty() and not options.yes)
    answers, seen = asked.answers()
    parse_recipe(recipe_text(answers), source=str(file))  # before anything is measured
    settle_threads(host, None, answers.workers)
    lacking = {option: said for option, name in _models(answers).items() if (said := _unreachable(name))}
    for note in () if asked.interactive else seen.notes:  # a person has been told
        print(wrapped("note", note), file=sys.stderr)
    told_already(f"data: {note}" for note in seen.notes)
    print_plan = None
    if not options.no_measure and not lacking:
        answers, print_plan, lacking = _measured(answers, host)
    text = recipe_text(answers)
    parse_recipe(text, source=str(file))
    with writing(file):
        file.write_text(text, encoding="utf-8")
    _tell(file, answers, seen, print_plan)
    for option, said in lacking.items():  # the last lines: without these models nothing trains
        name, key = _models(answers)[option], MODELS[option]
        print(wrapped("  -", f"{key}: {name} {said}; give {option} FOLDER_OR_ID --force, or change {key} in {file}"))
    return 0


def _models(answers: Answers) -> dict[str, str]:
    """The models of a recipe, by the options that name them."""
    return {"--student": answers.backbone, **({"--teacher": answers.model} if answers.model else {})}


def _unreachable(name: str) -> str | None:
    """Why a model cannot be loaded here; None where that is not known before it is tried."""
    return None if reachable(name) else "is not here, and the Hub cannot be reached"


@dataclass
class _Asked:
    """The answers of a person, or of options; each question has a default from the data and the machine."""

    options: argparse.Namespace
    interactive: bool
    problems: list[str] = field(default_factory=list)

    def _ask(self, name: str, question: str, default: str | None, check: Callable[[str], Any]) -> Any:
        """The answer to a question, as `check` returns it; a person is asked again where it raises, of options all
        problems are told at once: None stands in until then."""
        given = getattr(self.options, name)
        try:
            if given is not None:
                return check(str(given))
            if not self.interactive:
                if default is None:
                    raise InputError(f"--{name}: expected a value, as it has no default here; give --{name}")
                return check(default)
        except InputError as error:
            self.problems += error.problems
            return None
        shown = "" if default is None else f" [{default}]"
        while True:
            try:
                if said := input(f"{question}{shown}: ").strip() or (default or ""):
                    return check(said)
            except InputError as error:
                print("\n".join(f"  {problem}" for problem in error.problems))
            except EOFError:
                raise InputError("init: the input ended before all questions were answered") from None

    def answers(self) -> tuple[Answers, Seen]:
        """All answers.

        Raises:
            InputError: for data that cannot be used, and for answers that are none or do not go together.
        """
        from cankd_hf.cli.data import name_of
        from cankd_hf.cli.looking import image_size
        from cankd_hf.cli.starting import DEVICES, Answers, check_device, check_hours, check_student, check_teacher
        from cankd_hf.tasks import TASKS

        gpu, bf16 = machine()
        seen, task = self._looked()
        starter = TASKS[task].starter if task else None
        default = "edge" if gpu else "cpu"
        device = self._ask("device", f"What must it run on ({', '.join(DEVICES)})", default, check_device)
        proposed, known = _teacher(starter, seen, gpu), "none, dinov2-small, dinov2-base, a folder or a Hub id"
        teacher = self._ask("teacher", f"Teacher ({known})", proposed, lambda text: check_teacher(text, starter))
        hours = self._ask("hours", "Hours that training may take", "1", check_hours)
        student = self._student(device, check_student)
        if self.problems or seen is None or starter is None:
            raise InputError(self.problems)
        data = {**_splits(seen), "image_size": list(image_size(seen.shapes or [(224, 224)], DEVICES[device].longest))}
        cores = usable_cores()
        workers = min(8, max(1, cores - 1)) if gpu else (1 if cores > 2 else 0)
        made = Answers(task, starter, data, _free(name_of(seen.path)), device, teacher, hours, gpu, bf16, workers)
        return replace(made, student=student, **_guess(made, seen)), seen

    def _student(self, device: str | None, check: Callable[[str], str]) -> str:
        """The student's backbone, "" for the device's; a person is asked where that one cannot be loaded."""
        from cankd_hf.cli.starting import DEVICES

        usual = DEVICES[device].backbone if device in DEVICES else ""
        asks = self.interactive and self.options.student is None and bool(usual) and not reachable(usual)
        if not asks and self.options.student is None:
            return ""
        question = f"Student ({usual} is not here, and the Hub cannot be reached: a folder with a model, or as it is)"
        given = self._ask("student", question, usual, lambda text: "" if text == usual else check(text))
        return str(given or "")

    def _looked(self) -> tuple[Seen | None, str]:
        """The data, looked at, and what is learned of it; None and "" where an option has a problem."""
        from cankd_hf.cli.data import print_seen
        from cankd_hf.cli.looking import look_at
        from cankd_hf.tasks import TASKS

        given, kind = self.options.task, None
        if given is not None and given not in TASKS:
            self.problems.append(f"--task: {not_one_of(given, TASKS)}")
        elif given is not None:
            kind = TASKS[given].label_kind
        asked = "Where is the data (a folder, parquet file or Hub id)"
        seen = self._ask("data", asked, _here(), lambda text: look_at(text, kind, LOOKED_AT))
        if seen is None:
            return None, ""
        if self.interactive:
            print_seen(seen)
        fitting = [name for name, task in TASKS.items() if task.label_kind in (*seen.kinds, "images") and task.starter]

        def check(text: str) -> str:
            if text in TASKS and TASKS[text].starter is None:
                raise InputError(f"--task: there is no first recipe for {text} yet; copy one: cankd recipes")
            if text not in fitting:
                raise InputError(f"--task: of this data {not_one_of(text, fitting)}")
            return text

        if given is not None and given not in TASKS:  # which is told already
            return seen, ""
        task = self._ask("task", f"What is learned ({', '.join(fitting)})", seen.task.name, check)
        if task and TASKS[task].label_kind != seen.kind:
            seen = look_at(seen.path, TASKS[task].label_kind, LOOKED_AT)
        return seen, task or ""


def machine() -> tuple[bool, bool]:
    """Whether this machine has an accelerator, and whether it computes in bf16 by its own instructions."""
    import torch

    if not torch.accelerator.is_available():
        return False, cpu_bf16()
    cuda = torch.cuda.is_available()
    return True, cuda and torch.cuda.is_bf16_supported(including_emulation=False)


def _here() -> str | None:
    """The folder in which the command runs, if it has images."""
    from cankd_hf.data.layouts import look

    try:
        look(Path("."))
    except InputError:
        return None
    return "."


def _teacher(starter: Any, seen: Seen | None, gpu: bool) -> str:
    """The teacher to propose: none where distilling is not known to pay."""
    if starter is not None and seen is not None and seen.sizes and next(iter(seen.sizes.values())) < starter.least:
        return "none"
    return "dinov2-base" if gpu else "dinov2-small"


def _free(name: str) -> str:
    """The name, or one with a number, of which `runs/` has no folder yet."""
    names = (name, *(f"{name}_{number}" for number in range(2, 1000)))
    return next(one for one in names if not os.path.lexists(Path("runs") / one))


def _splits(seen: Seen) -> dict[str, Any]:
    """The section that was found, with all splits written out."""
    kept = {"train_split": "train", "eval_split": "validation", **seen.settings}
    kept.pop("image_size", None)
    return {"path": kept.pop("path"), **kept}


def _guess(answers: Answers, seen: Seen) -> dict[str, Any]:
    """Steps and cache without a measurement: a step of a second on a CPU, of a fifth on a GPU."""
    steps = max(20, int(answers.hours * 3600 * (5 if answers.gpu else 1) * SPENT))
    images = next(iter(seen.sizes.values()), 0)
    passes = steps * answers.batch / images if images else 0.0
    return {"steps": _round(steps), "cached": bool(answers.model) and passes >= 4}


def _round(steps: float) -> int:
    """Two digits of a number of steps, at least 20."""
    unit = 10 ** max(0, len(str(int(steps))) - 2)
    return max(20, int(steps // unit * unit))


def _measured(answers: Answers, host: Host) -> tuple[Answers, Any, dict[str, str]]:
    """Steps that fill the hours, and whether a cache pays, from steps measured here; what prints the plan; and which
    models cannot be loaded, by the options that name others.

    Where the data or a model cannot be loaded the answers stay as they are, and the reason is printed.
    """
    from cankd_hf.cli.data import wrapped
    from cankd_hf.cli.plan import Planned, print_plan
    from cankd_hf.cli.starting import recipe_text
    from cankd_hf.runs.recipe import parse_recipe

    recipe = parse_recipe(recipe_text(replace(answers, cached=False)))
    try:
        with Planned(recipe) as planned:
            found = planned.within(answers.hours * 3600 * SPENT)
    except (InputError, OSError) as error:
        said = error.problems[0] if isinstance(error, InputError) else " ".join(str(error).split())
        print(wrapped("  -", f"not measured, the steps are a guess: {said}"))
        lacking = [option for option, name in _models(answers).items() if name in said]
        return answers, None, dict.fromkeys(lacking, "cannot be loaded")
    made = replace(answers, steps=found.steps, cached=found.cached, measured=True)

    def show() -> None:
        print_plan(console(80), [("", found.forecast)], [], found.forecast.chosen, recipe.output_dir, host)

    return made, show, {}


def _tell(file: Path, answers: Answers, seen: Seen, show: Any) -> None:
    """What was written, its plan, and what comes next."""
    from cankd_hf.cli.data import wrapped

    print(f"{file}: written. The steps:")
    teacher = answers.model or "no teacher"
    stored = ", whose answers are stored" if answers.cached else ""
    recipe = shlex.quote(str(file))
    named = f" --task {seen.task.name}" if seen.asked_for else ""
    print(f"  1. look at the data:  cankd data {shlex.quote(seen.path)}{named}")
    print(f"  2. dry run:           cankd train {recipe} --dry-run")
    print(f"  3. train:             cankd train {recipe}")
    print(f"     {answers.steps:,} steps; {teacher}{stored}")
    print(f"  4. look at it:        cankd visualize runs/{answers.name}")
    print(f"  5. for the device:    cankd export runs/{answers.name}")
    for line in answers.pays:
        print(wrapped("  -", line))
    if show is not None:
        show()
    else:
        print(f"Time, memory and disk: cankd train {recipe} --dry-run measures a step and says.")
