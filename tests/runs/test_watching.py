"""Watching a run: which part it is, what is left, what is advised, what is quiet."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from cankd_hf.cli import doctor
from cankd_hf.config.recipe import Recipe
from cankd_hf.data.common.dataset import ImageDataset
from cankd_hf.data.common.unlabelled import WithUnlabelled
from cankd_hf.data.common.views import SeededDataset
from cankd_hf.figures import warning_signs
from cankd_hf.host import Host
from cankd_hf.quiet import quiet_libraries, told_already
from cankd_hf.runs import clock as module
from cankd_hf.runs.build import training_args
from cankd_hf.runs.clock import RunClock, Stretch, evaluations_of, run_clock
from cankd_hf.runs.recipe import parse_recipe
from cankd_hf.training.batchnorm import allow_single_values
from cankd_hf.training.monitoring import waiting
from cankd_hf.training.monitoring.waiting import what_helps
from tests.training.tiny_trainers import Images


class Time:
    """Replaces `time.perf_counter`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)


def arguments(**changes: Any) -> Any:
    settings = {"train_batch_size": 4, "gradient_accumulation_steps": 1, "world_size": 1, "num_train_epochs": 3.0}
    settings |= {"eval_strategy": "steps", "eval_steps": 50, "logging_steps": 10, "device": torch.device("cpu")}
    return SimpleNamespace(**{**settings, "dataloader_num_workers": 0, **changes})


def trained(clock: RunClock, time: Time, args: Any, steps: int, upto: int, step: float, image: float) -> None:
    """Steps of a part and its evaluations, each of which takes its time."""
    state = SimpleNamespace(max_steps=steps, global_step=0)
    clock.on_train_begin(args, state, None)
    for number in range(1, upto + 1):
        time.now += step if number > 1 else 10 * step  # the first one compiles
        state.global_step = number
        clock.on_step_end(args, state, None)
        if number % args.eval_steps == 0:
            clock.on_prediction_step(args, state, None)
            time.now += image * clock.evaluated
            clock.on_evaluate(args, state, None, metrics={"eval_miou": 0.1, "eval_runtime": image * clock.evaluated})


def test_what_is_left_is_of_all_parts_with_their_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    time, args = Time(monkeypatch), arguments()
    parts = [Stretch("teacher", 100, 2), Stretch("student alone", 200, 4), Stretch("student distilled", 200, 4)]
    clock = RunClock(parts, evaluated=10, scored=20)
    assert clock.begin("teacher") == "1 of 3: teacher, 100 steps" and clock.left() is None
    trained(clock, time, args, 100, 60, step=2.0, image=0.5)
    # 40 steps and one evaluation; each other part 200 steps and 4 evaluations; the scoring of each
    of_student = 200 * 2.0 + 4 * 10 * 0.5 + 20 * 0.5
    left = 40 * 2.0 + 10 * 0.5 + 20 * 0.5 + 2 * of_student
    assert clock.left() == pytest.approx(left)
    line = clock.begin("student alone")
    assert line == "2 of 3: student alone, 200 steps, about 7.2 min, 14 min to the end of the run"
    trained(clock, time, args, 200, 200, step=1.0, image=0.5)
    clock.on_prediction_step(args, SimpleNamespace(), None)
    clock.on_evaluate(args, SimpleNamespace(), None, metrics={"test_miou": 0.2, "test_runtime": 10.0})
    assert clock.begin("student distilled") == "3 of 3: student distilled, 200 steps, about 7.2 min"
    trained(clock, time, args, 200, 2, step=3.0, image=0.5)
    assert clock.left() == pytest.approx(198 * 3.0 + 4 * 10 * 0.5 + 20 * 0.5)


def test_the_parts_of_a_recipe_are_known_before_it_begins(tmp_path: Any) -> None:
    content = (
        "{output_dir: %s, baseline: true, data: {path: shapes}, student: {backbone: {model_type: resnet}}, "
        "teacher: {config: {model_type: cankd_fpn}, fit: {max_steps: 30}}, distill: {terms: [{loss: cankd}]}, "
        "training: {num_train_epochs: 2, per_device_train_batch_size: 4, eval_strategy: epoch}%s}"
    )
    phases = ", phases: [{name: maps, share: 0.5, distill: {task_weight: 0}}, {name: all, share: 0.5}]"
    data: Any = SimpleNamespace(train=Images(10), eval=Images(4))
    for more, titles, steps in (
        ("", ["teacher", "student alone", "student distilled"], [30, 6, 6]),
        (phases, None, [3, 3]),
    ):
        recipe: Recipe = parse_recipe(content % (tmp_path, more), [])
        clock = run_clock(recipe, data, Images(6))
        assert titles is None or [part.title for part in clock.parts] == titles
        assert [part.steps for part in clock.parts][-len(steps) :] == steps
        assert (clock.evaluated, clock.scored) == (4, 6)
    assert [part.title for part in clock.parts][-2:] == [
        "student distilled, phase maps",
        "student distilled, phase all",
    ]


@pytest.mark.parametrize(
    ("changes", "steps", "count"),
    [
        ({"eval_strategy": "no"}, 100, 0),
        ({"eval_strategy": "epoch"}, 100, 3),
        ({"eval_steps": 30}, 100, 3),
        ({"eval_steps": 0.25}, 100, 4),
        ({"eval_steps": None}, 100, 10),
    ],
)
def test_evaluations_are_counted(changes: dict[str, Any], steps: int, count: int) -> None:
    assert evaluations_of(arguments(**changes), steps) == count


class Source:
    """Two images."""

    generated = False

    def __len__(self) -> int:
        return 2


def images(cache: bool) -> ImageDataset:
    source: Any = Source()
    return ImageDataset(source, lambda image, label: {}, cache=cache)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("cache", "workers", "cores", "threads", "said", "unsaid"),
    [
        (False, 0, 8, 1, ("(now 0, 8 cores can be used)", "data.cache: true"), ()),
        (True, 0, 8, 1, ("dataloader_num_workers",), ("data.cache",)),
        (False, 7, 8, 1, ("data.cache: true",), ("dataloader_num_workers",)),
        (True, 7, 8, 1, ("loading and training share 8 cores",), ("data.cache", "dataloader_num_workers")),
        (True, 0, 2, 2, ("share 2 cores",), ("data.cache", "dataloader_num_workers")),
    ],
)
def test_advice_for_slow_loading_fits_the_settings(
    wrapped: bool,
    cache: bool,
    workers: int,
    cores: int,
    threads: int,
    said: tuple[str, ...],
    unsaid: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(waiting, "usable_cores", lambda: cores)
    monkeypatch.setattr(waiting.torch, "get_num_threads", lambda: threads)
    dataset: Any = images(cache)
    if wrapped:
        dataset = SeededDataset(WithUnlabelled(dataset, images(True), 1.0), 0)
    advice = what_helps(arguments(dataloader_num_workers=workers), dataset)
    assert all(text in advice for text in said) and not any(text in advice for text in unsaid), advice
    assert "data.cache" not in what_helps(arguments(), Images(2)), "a data set of one's own has no such setting"


@pytest.mark.parametrize(
    ("batch", "drop", "said", "unsaid"),
    [
        (4, False, "dataloader_drop_last: true", "per_device_train_batch_size"),
        (1, False, "per_device_train_batch_size", "dataloader_drop_last"),
        (1, True, "per_device_train_batch_size", "dataloader_drop_last"),
        (4, True, "running statistics for it.", "dataloader_drop_last"),
    ],
)
def test_advice_for_batches_of_one_image_fits_the_settings(
    batch: int, drop: bool, said: str, unsaid: str, caplog: pytest.LogCaptureFixture
) -> None:
    norm = nn.BatchNorm1d(3).train()
    allow_single_values(norm, arguments(per_device_train_batch_size=batch, dataloader_drop_last=drop))
    norm(torch.ones(1, 3))
    assert said in caplog.text and unsaid not in caplog.text


def test_advice_on_curves_fits_the_settings() -> None:
    fell = [{"step": step, "eval_miou": 0.5 - 0.01 * step} for step in range(1, 9)]
    assert "load_best_model_at_end" in warning_signs(fell, "miou")[0]
    assert warning_signs(fell, "miou", keeps_best=True) == []
    log = [{"step": n, "loss_instance_mse": 1.0 - 0.1 * n, "raw_correlation/s0t0": 0.3} for n in range(8)]
    [sign] = warning_signs(log, "miou")
    assert "The connector learnt" in sign and "instance_mse`" not in sign, "the control cannot be compared with itself"
    log = [{**entry, "branch_share/instance_mse/s0t0": 0.1} for entry in log]
    assert "compare with the control" in warning_signs(log, "miou")[0]


def test_the_doctor_does_not_advise_to_take_cores_that_others_use(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = "OMP_NUM_THREADS=1"
    found = {one.what: one for one in doctor.machine(Host(cores=4, others=2.6, asked=asked))}
    assert "keep cores busy" in found["cores"].advice and "unset" not in found["cores"].advice
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = {one.what: one for one in doctor.devices()}
    assert found["accelerator"].advice.startswith("CUDA_VISIBLE_DEVICES hides all GPUs")


def test_the_bar_stays_where_warnings_are_hidden(tmp_path: Path) -> None:
    logger = logging.getLogger("transformers")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)  # by which transformers decides
        student = "student: {backbone: {model_type: resnet}}"
        text = f"{{output_dir: x, data: {{path: shapes}}, {student}, training: {{max_steps: 1}}}}"
        assert training_args(parse_recipe(text, []), tmp_path).disable_tqdm is False
        assert training_args(parse_recipe(text, ["training.disable_tqdm=true"]), tmp_path).disable_tqdm is True
    finally:
        logger.setLevel(level)


def _noise() -> None:
    logging.getLogger("transformers.trainer").warning("of no use to anybody")
    logging.getLogger("timm.models").warning("nor this")
    logging.getLogger("cankd_hf.data").warning("ours stays")
    for name in ("torch.optim.lr_scheduler", "transformers", "cankd_hf.losses"):
        warnings.warn_explicit(f"of {name}", UserWarning, "x.py", 1, module=name)


@pytest.mark.parametrize("shows_all", [False, True])
def test_commands_hide_what_libraries_say_and_show_what_we_say(
    shows_all: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    loggers = [logging.getLogger(name) for name in ("transformers", "timm", "cankd_hf")]
    before = [(logger.level, list(logger.handlers)) for logger in loggers]
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with quiet_libraries(shows_all):
            assert (os.environ.get("TRANSFORMERS_VERBOSITY") == "error") is not shows_all
            _noise()
    assert [str(one.message) for one in shown].count("of cankd_hf.losses") == 1
    assert len(shown) == (3 if shows_all else 1)
    assert capsys.readouterr().err.count("ours stays") == 1
    assert [(logger.level, list(logger.handlers)) for logger in loggers] == before
    assert "TRANSFORMERS_VERBOSITY" not in os.environ


def test_of_several_processes_the_first_one_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    with quiet_libraries(False):
        logging.getLogger("cankd_hf.runs.run").warning("the same in each")
        logging.getLogger("cankd_hf.data.common.dataset").warning("skipped: x.jpg")
    assert capsys.readouterr().err == "skipped: x.jpg\n"


def test_what_is_said_of_a_data_set_is_told_once_in_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    ours = logging.getLogger("cankd_hf.data.common.sources")
    for _ in range(2):  # commands
        with quiet_libraries(False):
            told_already(["data: read in a table"])
            for _ in range(2):  # the set is opened again, as for a teacher of other statistics
                ours.warning("data: %s", "no class names")
                ours.warning("data: read in a table")
                ours.warning("MainThread: data: %s", "no class names")  # as of one of several students
            logging.getLogger("cankd_hf.training").warning("of a step")
            logging.getLogger("cankd_hf.training").warning("of a step")
        assert capsys.readouterr().err == "data: no class names\nof a step\nof a step\n"


def test_lines_are_broken_between_words_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "data: " + "some words " * 12 + "/a/path/that/stays-whole"
    monkeypatch.setenv("COLUMNS", "40")
    for on_terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda now=on_terminal: now, raising=False)
        with quiet_libraries(False):
            logging.getLogger("cankd_hf.data").warning("%s", text)
        said = capsys.readouterr().err
        lines = said.splitlines()
        assert (len(lines) > 1) is on_terminal and " ".join(said.split()) == " ".join(text.split())
        assert not on_terminal or max(map(len, lines)) <= 40
