"""Checkpoints are whole or set aside, a finished run trains no further step, and signals find their handlers again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import EarlyStoppingCallback, TrainerCallback

from cankd_hf.errors import InputError
from cankd_hf.training.checkpoint_files import ASIDE, LIST_FILE, flaw, newest, seal
from cankd_hf.training.lock import LOCK_FILE, FolderLock
from tests.processes import environment, run_two
from tests.training.tiny_trainers import CLASSES, Images, largest_difference, student, trainer, weights

SAVES = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with checkpoints 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    trainer(folder, **SAVES).train()
    return folder


def copy(finished: Path, folder: Path) -> Path:
    subprocess.run(["cp", "-r", str(finished), str(folder)], check=True)
    return folder


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 0x40
    file.write_bytes(content)


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def not_a_number(file: Path) -> None:
    """NaN in a weight, with a list that was made again."""
    state = load_file(file)
    name = next(iter(state))
    save_file({**state, name: torch.full_like(state[name], torch.nan)}, file, metadata={"format": "pt"})
    (file.parent / LIST_FILE).unlink()
    seal(file.parent, {})


def unlisted(file: Path) -> None:
    """A damaged file in a checkpoint of an earlier version."""
    file.write_bytes(b"abc")
    (file.parent / LIST_FILE).unlink()


DAMAGE: dict[str, Callable[[Path], None]] = {
    **{name: lambda f, n=name: (f / n).unlink() for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")},
    **{f"no {name}": lambda f, n=name: (f / n).unlink() for name in ("model.safetensors", "trainer_state.json")},
    "flipped weights": lambda f: flipped(f / "model.safetensors"),
    "flipped connectors": lambda f: flipped(f / "distiller.safetensors"),
    "empty state": lambda f: emptied(f / "trainer_state.json"),
    "empty list": lambda f: emptied(f / LIST_FILE),
    "cut optimizer": lambda f: (f / "optimizer.pt").write_bytes((f / "optimizer.pt").read_bytes()[:100]),
    "no file in the list": lambda f: (f / LIST_FILE).write_text("{}") and None,
    "another list": lambda f: (f / LIST_FILE).write_text('{"files": {"optimizer.pt": 1}}') and None,
    "a deep list": lambda f: (f / LIST_FILE).write_text("[" * 99999) and None,
    "listed NaN": lambda f: not_a_number(f / "model.safetensors"),
    **{f"unlisted {name}": lambda f, n=name: unlisted(f / n) for name in ("optimizer.pt", "scheduler.pt")},
    **{f"unlisted {name}": lambda f, n=name: unlisted(f / n) for name in ("rng_state.pth", "model.safetensors")},
    "unlisted manifest": lambda f: unlisted(f / "teacher_manifest.json"),
    "only a folder": lambda f: [path.unlink() for path in f.iterdir()] and None,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_set_aside_and_training_goes_on_from_the_one_before(
    damage: str, finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = copy(finished, tmp_path / "run")
    DAMAGE[damage](run / "checkpoint-3")
    with pytest.raises(InputError, match="checkpoint-3: "):
        trainer(run, **SAVES).train(resume_from_checkpoint=str(run / "checkpoint-3"))
    resumed = trainer(run, **SAVES)
    resumed.train(resume_from_checkpoint=True)
    assert caplog.text.count("set aside as broken-checkpoint-3") == 1
    assert (run / "broken-checkpoint-3").is_dir() and flaw(run / "checkpoint-3") is None
    again = load_file(run / "checkpoint-3" / "model.safetensors")
    assert largest_difference(load_file(finished / "checkpoint-3" / "model.safetensors"), again) == 0


def test_weights_that_are_not_finite_are_not_resumed(finished: Path, tmp_path: Path) -> None:
    run = copy(finished, tmp_path / "run")
    not_a_number(run / "checkpoint-3" / "model.safetensors")
    (run / "checkpoint-3" / LIST_FILE).unlink()  # as an earlier version left it
    with pytest.raises(InputError, match="expected finite weights, got NaN or infinity in"):
        trainer(run, **SAVES).train(resume_from_checkpoint=str(run / "checkpoint-3"))


def test_other_classes_are_refused_by_name(finished: Path, tmp_path: Path) -> None:
    names = {index: f"thing {index}" for index in range(CLASSES)}
    other = trainer(tmp_path, model=student(id2label=names), **SAVES)
    with pytest.raises(InputError, match="class 0 was 'LABEL_0', is now 'thing 0'"):
        other.train(resume_from_checkpoint=str(finished / "checkpoint-2"))


def test_a_checkpoint_without_optimizer_is_no_place_to_go_on_from(tmp_path: Path) -> None:
    trainer(tmp_path, **SAVES, save_only_model=True).train()
    with pytest.raises(InputError, match="save_only_model"):
        trainer(tmp_path, **SAVES).train(resume_from_checkpoint=True)
    assert (tmp_path / "checkpoint-3").is_dir()


def test_a_finished_run_trains_no_further_step(finished: Path, tmp_path: Path) -> None:
    run = copy(finished, tmp_path / "run")
    resumed = trainer(run, **SAVES)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    student_then = load_file(finished / "checkpoint-3" / "model.safetensors")
    assert largest_difference(student_then, resumed.student.state_dict()) == 0
    start = trainer(tmp_path / "none", **{**SAVES, "max_steps": 0})
    before = weights(start)
    start.train()
    assert start.state.global_step == 0 and largest_difference(before, weights(start)) == 0


def test_a_run_that_stopped_early_is_finished_too(tmp_path: Path) -> None:
    settings = {**SAVES, "max_steps": 9, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "miou", "greater_is_better": True}
    for _ in range(2):
        made = trainer(
            tmp_path,
            **settings,
            **best,
            eval_dataset=Images(4),
            callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        )
        made.train(resume_from_checkpoint=True if (tmp_path / "checkpoint-3").is_dir() else None)
        assert made.state.global_step == 3


def test_the_best_checkpoint_is_found_after_the_run_was_moved(tmp_path: Path) -> None:
    settings = {**SAVES, "eval_strategy": "steps", "eval_steps": 1, "eval_dataset": Images(4)}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "miou", "greater_is_better": False}
    first = trainer(tmp_path / "old", **settings, **best)
    first.train()
    assert first.state.best_model_checkpoint == str(tmp_path / "old" / f"checkpoint-{first.state.best_global_step}")
    (tmp_path / "old").rename(tmp_path / "new")
    moved = trainer(tmp_path / "new", **settings, **best)
    moved.train(resume_from_checkpoint=True)
    assert moved.state.best_model_checkpoint == str(tmp_path / "new" / f"checkpoint-{first.state.best_global_step}")
    assert largest_difference(weights(first), weights(moved)) == 0


def test_callbacks_see_the_final_folder_and_nothing_partial_is_left(tmp_path: Path) -> None:
    seen = []

    class See(TrainerCallback):
        def on_save(self, args, state, control, **_):  # type: ignore[no-untyped-def]
            seen.append(flaw(Path(args.output_dir) / f"checkpoint-{state.global_step}"))

    trainer(tmp_path, **SAVES, save_total_limit=2, callbacks=[See()]).train()
    assert seen == [None, None, None]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]


def test_a_sealed_folder_is_put_in_place_and_an_unsealed_one_removed(finished: Path, tmp_path: Path) -> None:
    run = copy(finished, tmp_path / "run")
    (run / ASIDE).mkdir()
    (run / "checkpoint-3").rename(run / ASIDE / "checkpoint-3")
    assert newest(run) == run / "checkpoint-3"
    (run / ASIDE).mkdir()
    (run / "checkpoint-3").rename(run / ASIDE / "checkpoint-3")
    (run / ASIDE / "checkpoint-3" / LIST_FILE).unlink()
    assert newest(run) == run / "checkpoint-2" and not (run / ASIDE).exists()


def test_a_sealed_folder_lists_every_file(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a").write_text("a")
    (tmp_path / "trainer_state.json").write_text('{"global_step": 1}')
    seal(tmp_path, {"processes": 1})
    assert set(json.loads((tmp_path / LIST_FILE).read_text())["files"]) == {"inner/a", "trainer_state.json"}
    assert flaw(tmp_path) is None
    (tmp_path / "inner" / "a").write_text("b")
    assert flaw(tmp_path) == "inner/a was changed after it was saved"


@pytest.mark.slow
def test_two_processes_write_and_check_one_checkpoint(tmp_path: Path) -> None:
    run_two(Path(__file__).with_name("two_processes.py"), tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["difference"] == 0 and found["steps"] == 4
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "model.safetensors"} <= set(found["files"])
    assert found["folders"] == ["broken-checkpoint-4", "checkpoint-2", "checkpoint-3", "checkpoint-4"]


class Raise(TrainerCallback):
    """Does something at the end of the second step."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def on_step_end(self, args, state, control, **_):  # type: ignore[no-untyped-def]
        if state.global_step == 2:
            self.act()


def fail() -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("act", "error"),
    [
        (fail, ZeroDivisionError),
        (lambda: os.kill(os.getpid(), signal.SIGINT), KeyboardInterrupt),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), SystemExit),
    ],
)
def test_handlers_are_restored_on_every_way_out(
    act: Callable[[], None], error: type[BaseException], tmp_path: Path
) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    made = trainer(tmp_path, **{**SAVES, "save_steps": 100}, callbacks=[Raise(act)])
    with pytest.raises(error) as raised:
        made.train()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert not (tmp_path / LOCK_FILE).exists()
    if error is not ZeroDivisionError:
        assert newest(tmp_path) is not None, "a checkpoint is saved first"
        resumed = trainer(tmp_path, **SAVES)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 3
    if error is SystemExit:
        assert raised.value.code == 143  # type: ignore[attr-defined]


def test_a_second_training_in_the_same_folder_is_refused_with_the_process_that_holds_it(tmp_path: Path) -> None:
    code = f"from pathlib import Path; from cankd_hf.training.lock import FolderLock as L; L(Path({str(tmp_path)!r}))"
    holder = subprocess.Popen(
        [sys.executable, "-c", f"{code}.__enter__(); print('held', flush=True); import time; time.sleep(100)"],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"process {holder.pid} on "):
        trainer(tmp_path, **SAVES).train()
    holder.kill()
    holder.wait()
    trainer(tmp_path, **SAVES).train()
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_lock_of_another_host_is_taken_when_it_gives_no_sign_of_life(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lock = tmp_path / LOCK_FILE
    lock.write_text(json.dumps({"process": 1, "host": "elsewhere", "started": 0.0}))
    with pytest.raises(InputError, match="process 1 on elsewhere"), FolderLock(tmp_path):
        pass
    os.utime(lock, (time.time() - 1000,) * 2)
    with FolderLock(tmp_path), FolderLock(tmp_path):  # nested in one process
        assert json.loads(lock.read_text())["process"] == os.getpid()
    assert "process 1 on elsewhere ended without releasing it" in caplog.text and not lock.exists()
    lock.write_text("{")
    os.utime(lock, (time.time() - 1000,) * 2)
    with FolderLock(tmp_path):
        pass


def test_of_two_that_find_a_stale_lock_one_gets_it(tmp_path: Path) -> None:
    def take() -> int:
        process = os.fork()
        if not process:
            try:
                FolderLock(tmp_path).__enter__()
                time.sleep(0.5)
                os._exit(0)
            except InputError:
                os._exit(2)
        return process

    for _ in range(5):
        (tmp_path / LOCK_FILE).write_text(json.dumps({"process": 2, "host": "gone", "started": 0.0}))
        os.utime(tmp_path / LOCK_FILE, (0, 0))
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in [take(), take()]]
        assert sorted(codes) == [0, 2]
        (tmp_path / LOCK_FILE).unlink()


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"process": "a"}', '{"process": -5, "host": "HOST", "started": 1}', '{"process": 1e400, "host": "x"}'],
)
def test_a_lock_that_says_nothing_is_taken(content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lock = tmp_path / LOCK_FILE
    lock.write_text(content.replace("HOST", socket.gethostname()))
    os.utime(lock, (time.time() - 3,) * 2)  # no process takes so long to write it
    with FolderLock(tmp_path):
        assert json.loads(lock.read_text())["process"] == os.getpid()
    assert "ended without releasing it" in caplog.text
    lock.mkdir()
    with pytest.raises(InputError, match="expected a lock file"), FolderLock(tmp_path):
        pass


def test_persistent_workers_leave_the_random_numbers_of_a_resumed_run_alone(tmp_path: Path) -> None:
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    settings = {**SAVES, **workers, "max_steps": 4}  # two steps are an epoch
    whole = trainer(tmp_path, model=student(dropout=0.5), **settings)
    whole.train()
    resumed = trainer(tmp_path, model=student(dropout=0.5), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert largest_difference(weights(whole), weights(resumed)) == 0


def test_training_without_a_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="3 images make no whole batch of 8, and dataloader_drop_last"):
        trainer(tmp_path, data=Images(3), dataloader_drop_last=True).train()
