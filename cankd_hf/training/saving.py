"""The methods of `CanKDTrainer` that write checkpoints and go on from them."""

import logging
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cankd_hf.data.common.decode import Unusable, WrongLabels
from cankd_hf.errors import InputError
from cankd_hf.hub.facts import write_facts
from cankd_hf.json_text import finite
from cankd_hf.models.weight_files import share
from cankd_hf.names import AVERAGE_FILE, EMA, RECIPE_FILE, STATE_FILE
from cankd_hf.teachers.health import TeacherHealth
from cankd_hf.training import checkpoint_files as files
from cankd_hf.training.averaging import AveragingMixin
from cankd_hf.training.callbacks import GracefulStopCallback
from cankd_hf.training.checkpoint import (
    check_classes,
    check_finite,
    check_teachers,
    load_checkpoint,
    save_distillation,
    split_state,
)
from cankd_hf.training.facts import run_facts
from cankd_hf.training.lock import FolderLock
from cankd_hf.training.monitoring.energy import EnergyMeter
from cankd_hf.training.working import WorkingCallback

logger = logging.getLogger(__name__)


class CheckpointMixin(AveragingMixin):
    """Methods of `CanKDTrainer` that replace those of `transformers.Trainer` for checkpoints."""

    recipe: str | None
    inherited: Sequence[str]
    energy: EnergyMeter
    health: TeacherHealth
    working: WorkingCallback
    graceful: GracefulStopCallback
    phases_ended: Sequence[dict[str, Any]] = ()
    keep_connectors = False  # beside the student at the end, for a phase that goes on with them
    _aside: Path | None = None  # where a checkpoint is being written
    _ended_early = False  # by a callback, in the checkpoint that training goes on from

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """As `Trainer.train`; Ctrl-C saves a checkpoint first, and damaged checkpoints are not used.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the newest whole one of `output_dir`.
            trial: of a hyperparameter search.
            ignore_keys_for_eval: as for `Trainer.train`.

        Raises:
            InputError: if a checkpoint cannot be used or written, another process trains in `output_dir`, or an image
                cannot be used (`Unusable`, `WrongLabels`), with a checkpoint saved.
            KeyboardInterrupt: after Ctrl-C, with a checkpoint saved; SystemExit (143) after SIGTERM.
        """
        out, main = Path(self.args.output_dir or ""), self.is_world_process_zero()
        if main:
            files.check_folder(out)
        with FolderLock(out) if main else nullcontext(), self.graceful.listening():
            if resume_from_checkpoint:
                resume_from_checkpoint = self._usable(resume_from_checkpoint, out)
            try:
                result = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
            except (Unusable, WrongLabels) as error:
                skip = ["data.on_error=skip leaves such files out"] if isinstance(error, Unusable) else []
                raise type(error)([*error.problems, self._keep_work(trial), *skip]) from error
            finally:
                self.close_loaders()
        self.graceful.leave()
        self.choose_weights()
        return result

    def _keep_work(self, trial: Any) -> str:
        """Saves a checkpoint after an image that cannot be used has ended training; returns where the work is.

        All batches of a step are read before it begins, so this is between two steps. Of several processes only one
        knows of the image, and the others wait for it, so that they save nothing.
        """
        step = self.state.global_step
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{step}"
        if step and self.args.world_size == 1 and not folder.is_dir():
            self._save_checkpoint(self.distiller, trial)
        if not step:
            return "no step was taken yet; mend the file and start again"
        where = f"{folder} holds all of it" if folder.is_dir() else "the newest checkpoint, if there is one, is left"
        return f"training stopped after step {step}: {where}; mend the file and resume"

    def _usable(self, asked: str | bool, out: Path) -> str:
        """The folder to resume from; raises InputError if it is missing, damaged or has no optimizer."""
        if asked is True:
            found = files.chosen(out, self.is_world_process_zero())
            if found is None:
                raise InputError(f"resume_from_checkpoint: expected a whole checkpoint in {out}, found none")
        else:
            found = Path(str(asked))
            files.check_whole(found, self.is_world_process_zero())
            if reason := files.why_not_resumed(found):
                raise InputError(f"{found}: {reason}; resume from another checkpoint, or start over without one")
        processes = files.read_list(found).get("processes", self.args.world_size)
        if processes != self.args.world_size:
            logger.warning(
                "%s: saved by %s processes, resumed by %s: batches and random numbers differ from those of an "
                "uninterrupted run",
                *(found, processes, self.args.world_size),
            )
        return str(found)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        epochs, steps = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        run, resumed = Path(self._get_output_dir(trial)), resume_from_checkpoint
        self._ended_early = resumed is not None and bool(files.read_list(Path(resumed)).get("ended_early"))
        best = run / f"checkpoint-{self.state.best_global_step}"
        inside = resumed is not None and Path(resumed).resolve().parent == run.resolve()
        if self.state.best_global_step and best.is_dir() and inside:
            self.state.best_model_checkpoint = str(best)  # the run was moved, copied, or called from another folder
        return epochs, steps

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self._ended_early or self.state.global_step >= self.state.max_steps:
            # Resumed from the end: the Trainer would train one more step.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _finalize_training(self, trial: Any, *args: Any) -> Any:
        if self.graceful.agreed(self.args) and not self.graceful.stopped:  # asked after the last step
            self.graceful.stopped = True
            if not (Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}").is_dir():
                self._save_checkpoint(self.distiller, trial)
        return super()._finalize_training(trial, *args)  # type: ignore[no-untyped-call]

    def _get_output_dir(self, trial: Any) -> str:
        return str(super()._get_output_dir(trial) if self._aside is None else self._aside)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint aside, and renames it into place when all processes have written their part."""
        run = Path(self._get_output_dir(trial))
        aside = run / files.ASIDE
        folder, final = (place / f"checkpoint-{self.state.global_step}" for place in (aside, run))
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with files.writing(final):
            self._aside = aside
            try:
                super()._save_checkpoint(model, trial)
            except BaseException:
                if self.args.should_save:
                    shutil.rmtree(aside, ignore_errors=True)
                raise
            finally:
                self._aside = None
            if self.state.best_model_checkpoint == str(folder):
                self.state.best_model_checkpoint = str(final)
            self.accelerator.wait_for_everyone()
            # On other nodes without a shared folder, the first process there has a part of its own.
            for place in (self.args.should_save, self.is_local_process_zero() and not self.args.should_save):
                if place and folder.is_dir():
                    self._publish(folder, final)
                self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            files.rotate(run, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _publish(self, folder: Path, final: Path) -> None:
        if (folder / STATE_FILE).is_file():
            self.state.save_to_json(str(folder / STATE_FILE))  # with the final path of the best checkpoint
        last = self.state.global_step >= self.state.max_steps
        facts = {
            "processes": self.args.world_size,
            "save_only_model": self.args.save_only_model,
            "ended_early": self.control.should_training_stop and not self.graceful.stopped and not last,
        }
        files.seal(folder, facts)
        files.publish(folder, final)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._aside is None:  # else pushed when it is in place
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir or "")
        with files.writing(folder):
            self._write(folder, state_dict)

    def _write(self, folder: Path, state_dict: dict[str, Tensor] | None) -> None:
        student, rest = split_state(self.distiller.state_dict() if state_dict is None else state_dict)
        check_finite(folder, {**student, **rest})
        whole = not folder.name.startswith("checkpoint-")
        facts = self._facts(best=whole and self.ema_facts().get("chosen") != EMA)
        for name, state in {"": student, **self.students()}.items():
            self._write_student(folder / name, state, {**facts, **self.scores_of(name)})
        if not whole or self.keep_connectors:
            save_distillation(folder, rest, self.teachers)
        if not whole and self.average is not None and not self.args.save_only_model:
            self.average.save(folder / AVERAGE_FILE)

    def _write_student(self, folder: Path, state: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """A student in a folder that needs nothing else."""
        check_finite(folder, state)
        folder.mkdir(parents=True, exist_ok=True)
        self.student.save_pretrained(folder, state_dict=dict(state))  # which it empties
        share(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        if self.recipe is not None:
            (folder / RECIPE_FILE).write_text(self.recipe, encoding="utf-8")
        write_facts(folder, facts)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        entry = self.state.log_history[-1]  # of trainer_state.json
        entry.update(finite(entry))

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        super().save_metrics(split, finite(metrics), combined)

    def _facts(self, best: bool) -> dict[str, Any]:
        """Facts for the card of the saved student; `best`: it may be the best checkpoint, loaded at the end."""
        facts = run_facts(
            self.args, self.state, self.task, self.distiller, self.teachers, self.inherited, self.energy, best
        ) | {"teacher_findings": self.health.findings, "working": self.working.facts(), "ema": self.ema_facts()}
        return facts | ({"phases": self.phases_ended} if self.phases_ended else {})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        check_teachers(Path(resume_from_checkpoint), self.teachers)
        check_classes(Path(resume_from_checkpoint), self.student)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        load_checkpoint(self.distiller, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
            return
        logger.info("Loading the best model: %s (%s)", self.state.best_model_checkpoint, self.state.best_metric)
        files.check_whole(Path(str(self.state.best_model_checkpoint)), self.is_world_process_zero())
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))
