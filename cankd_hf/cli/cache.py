"""`python -m cankd_hf.cache RECIPE [section.key=value ...]`: the stored answers of teachers."""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cankd_hf.commands import command_parser, console, exit_code, importing
from cankd_hf.errors import InputError
from cankd_hf.host import read_host, wait_passively

EXAMPLES = """examples:
  python -m cankd_hf.cache recipes/camvid_cankd.yaml teacher.cache.views=16 teacher.cache.codec=pca --plan
  python -m cankd_hf.cache recipes/camvid_cankd.yaml teacher.cache.views=16 teacher.cache.codec=pca
  python -m cankd_hf.cache recipes/camvid_cankd.yaml teacher.cache.views=16 teacher.cache.codec=pca --check
  accelerate launch -m cankd_hf.cache recipes/camvid_cankd.yaml teacher.cache.views=16

Training with the same section `teacher.cache` reads what is stored, and stores what is missing: nothing has to be
filled before it. docs/cache.md explains all of it.

exit codes: 0 done, 2 bad input (or --check found answers that are none of this teacher), 130 stopped (what was written
is kept, and the same command goes on)"""
EVERY = 10.0  # seconds between two lines of progress
CHECKED = 8  # batches


def parser() -> argparse.ArgumentParser:
    """The command line, without importing anything heavy."""
    made = command_parser("cache", "Store a teacher's answers, so that training does not run it again.", EXAMPLES)
    made.add_argument("recipe", help="YAML file of a training, with a section teacher.cache")
    made.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")
    what = made.add_mutually_exclusive_group()
    what.add_argument(
        "--plan", action="store_true", help="say how large it will be and how long it takes; write nothing"
    )
    what.add_argument("--check", action="store_true", help="compare a sample of the stored answers with live ones")
    what.add_argument("--show", action="store_true", help="list what is stored in the folder")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns the exit code."""
    options = parser().parse_intermixed_args(argv)
    return exit_code(lambda: _run(options), "what was written is kept, and the same command goes on")


def _run(options: argparse.Namespace) -> int:
    from cankd_hf.runs.recipe import load_recipe

    host = read_host()
    wait_passively(host)
    with importing():
        recipe = load_recipe(options.recipe, options.overrides)
        caches = {name: one.cache for name, one in recipe.named_teachers().items() if one.cache is not None}
        if not caches:
            raise InputError(
                "teacher.cache: expected a section, got none; write `teacher: {..., cache: {views: 16}}`, or add "
                "teacher.cache.views=16"
            )
        if options.show:
            return show(sorted({Path(cache.folder) for cache in caches.values()}))
        from cankd_hf.runs.threads import settle_threads

        print(settle_threads(host, None, recipe.training.get("dataloader_num_workers") or 0))
        trainer = _trainer(recipe)
    if options.plan:
        return _plan(trainer)
    return _check(trainer) if options.check else _fill(trainer)


def _trainer(recipe: Any) -> Any:
    """The trainer of the recipe, that only asks its teachers."""
    from cankd_hf.runs.build import SCORE_ONLY, build_trainer
    from cankd_hf.runs.session import check_session
    from cankd_hf.tasks import TASKS

    check_session(recipe)
    configs = {}
    for name, config in recipe.named_teachers().items():
        folder = Path(recipe.output_dir) / ("teacher" if recipe.teacher is not None else f"teacher-{name}")
        if config.fit is not None:
            if not (folder / "config.json").is_file():
                raise InputError(
                    f"{recipe.teacher_path(name)}.fit: the recipe trains its teacher, and {folder} holds none yet; "
                    "run `python -m cankd_hf.train` with it first, which also stores its answers"
                )
            config = replace(config, model=str(folder), config=None, fit=None)
        configs[name] = config
    if recipe.teacher is not None:
        recipe = replace(recipe, teacher=configs["teacher"])
    else:
        recipe = replace(recipe, teachers=configs)
    task, data = TASKS[recipe.task].from_data(recipe.data, labelled=recipe.distill.task_weight > 0, splits=("train",))
    with tempfile.TemporaryDirectory() as scratch:  # the Trainer makes its output folder at once
        return build_trainer(recipe, task, data, Path(scratch), **SCORE_ONLY, dataloader_drop_last=False)


def _answers(trainer: Any) -> int:
    return int(len(trainer.train_dataset) * trainer.answers_each)


def _plan(trainer: Any) -> int:
    """Says what a store will take, and writes nothing."""
    for name, plan in trainer.plan_stores(_answers(trainer)).items():
        print(f"{name}: {plan.line()}")
    return 0


def _fill(trainer: Any) -> int:
    """Asks the teachers about every view of every image."""
    from cankd_hf.training.monitoring.cost import CostMeter

    main, begun = trainer.args.process_index == 0, time.perf_counter()
    answers = _answers(trainer)
    trainer.open_stores(answers)
    stored, spent = trainer.stored, _Spent(CostMeter())
    for one in stored.values():
        one.spends = spent.since
    last, done = time.perf_counter(), 0
    for pictures in trainer.fill():
        done += pictures * trainer.args.world_size
        stopped = [one.store.stopped for one in stored.values() if one.store.stopped]
        if stopped:
            raise InputError(stopped)
        if main and time.perf_counter() - last > EVERY:
            last = time.perf_counter()
            print(f"{done} of {answers} pictures, {last - begun:.0f} s", flush=True)
    trainer.close_loaders()
    trainer.accelerator.wait_for_everyone()
    for name, one in stored.items() if main else ():
        one.store.refresh()
        found = one.found
        print(
            f"{name}: {len(one.store)} answers in {one.store.folder}, {one.store.size / 1e9:.3f} GB; "
            f"{found.misses} computed and {found.hits} found in {time.perf_counter() - begun:.0f} s; "
            f"{found.refused} beyond the bound of their codec"
        )
    return 0


class _Spent:
    """What the command spends, shared out among the answers as they come."""

    def __init__(self, meter: Any) -> None:
        self._meter, self._before = meter, dict(meter.cost)

    def since(self) -> dict[str, float]:
        """Seconds by clock since this was last called."""
        before, self._before = self._before, dict(self._meter.cost)
        return {clock: now - before[clock] for clock, now in self._before.items()}


def _check(trainer: Any) -> int:
    """Compares stored answers for the first batches with live ones."""
    from cankd_hf.teachers.identity import machine

    names = trainer.open_stores(_answers(trainer), make=False)
    if names:
        raise InputError(
            [
                f"{name}: nothing is stored of this teacher; fill it with the same command without --check"
                for name in names
            ]
        )
    problems = []
    for name, one in trainer.stored.items():
        compared, worst = 0, dict[str, float]()
        elsewhere = one.store.header["machine"] != machine(trainer.args.device)
        for batch in trainer.first_batches(CHECKED):
            pictures = trainer.source.pictures(name, batch)
            for group in one.stored(pictures.keys, pictures.device):
                compared += len(group.places)
                for key, errors in one.differences(pictures, group).items():
                    worst[key] = max(worst.get(key, 0.0), float(errors.max()))
        if not compared:
            problems.append(f"{name}: none of the first pictures is stored; their images or augmentation differ")
        for key, value in worst.items():
            codec, bound = one.rows.codecs[key], one.allowed(key, elsewhere)
            verdict = "as stored" if value <= bound else "TOO FAR"
            said = f"{codec.error_of} {value:.2g} at worst of {compared} (allowed {bound:.2g})"
            print(f"{name}: {key} as {codec.kind}: {said}: {verdict}")
            if not value <= bound:
                problems.append(
                    f"{name}: {key} differs from the live teacher by {value:.2g}; delete {one.store.folder}"
                )
    if problems:
        raise InputError(problems)
    return 0


def show(folders: Sequence[Path]) -> int:
    """Lists the stores of some folders."""
    from rich.table import Table

    from cankd_hf.teachers.store import USES, Store
    from cankd_hf.teachers.store_files import read_header, stores_in

    table = Table(title="stored teachers", title_justify="left")
    for column in ("store", "teacher", "codec", "answers", "GB", "cost", "hits"):
        table.add_column(column, justify="left" if column in ("store", "teacher", "codec") else "right")
    for place in [place for folder in folders for place in stores_in(folder)]:
        header = read_header(place)
        if header is None:
            continue
        store = Store(place, header)
        kinds = [
            f"{key} {one['kind']} ({'exact' if one['kind'] == 'exact' else format(one['worst'], '.1g')})"
            for key, one in header["codecs"].items()
        ]
        used = [json.loads(file.read_text(encoding="utf-8")) for file in (place / USES).glob("*.json")]
        hits, misses = (sum(int(one[key]) for one in used) for key in ("hits", "misses"))
        cost = ", ".join(
            f"{seconds:.0f} s {clock.removesuffix('_seconds')}" for clock, seconds in store.spent().items()
        )
        share = f"{hits} of {hits + misses} in {len(used)} runs" if used else "-"
        teacher = f"{header['teacher']['model']} {header['identity']['dtype']} {header['identity']['weights'][:8]}"
        table.add_row(str(place), teacher, "\n".join(kinds), str(len(store)), f"{store.size / 1e9:.3f}", cost, share)
    console(160).print(table)
    return 0
