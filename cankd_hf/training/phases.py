"""Phases of a training: what goes on from one to the next, and `CanKDTrainer.train_phases`."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from safetensors.torch import load_file
from transformers import SchedulerType, set_seed
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from cankd_hf.config.distill import LossTerm
from cankd_hf.config.phases import Phase, phase_problems, steps_of
from cankd_hf.config.schema import Problems
from cankd_hf.data.common.seeds import derived_seed
from cankd_hf.data.common.views import SeededDataset
from cankd_hf.errors import InputError
from cankd_hf.names import DISTILLER_FILE, STATE_FILE
from cankd_hf.training.arguments import CanKDConfig, as_config
from cankd_hf.training.base import TeachingTrainer
from cankd_hf.training.checkpoint import STUDENT, read_student_weights
from cankd_hf.training.checkpoint_files import chosen
from cankd_hf.training.distiller import Distiller
from cankd_hf.training.objective import Objective

logger = logging.getLogger(__name__)

# Settings that the Trainer reads when training begins; the others belong to the whole training.
_NAMES = """
learning_rate lr_scheduler_type lr_scheduler_kwargs lr_drops warmup_steps weight_decay adam_beta1 adam_beta2
adam_epsilon max_grad_norm backbone_lr_scale eval_strategy eval_steps save_strategy save_steps save_total_limit
logging_steps
"""
SETTINGS = frozenset(_NAMES.split())
_WORDS = {"lr_scheduler_type": SchedulerType, "eval_strategy": IntervalStrategy, "save_strategy": SaveStrategy}
# A phase without a task loss has no score to choose by.
_UNSCORED = {"eval_strategy": "no", "load_best_model_at_end": False}


@dataclass
class Ended:
    """A phase that has ended: its folder, its terms, and whether it began with connectors of its own."""

    folder: Path
    terms: Sequence[LossTerm]
    fresh: bool = False


def go_on(distiller: Distiller, earlier: Sequence[Ended], fresh: bool = False) -> int:
    """Gives the student the weights of the last phase, and connectors and losses those of the last one that had them.

    A weight by share is measured anew: it is a share of another sum.

    Args:
        distiller: of the phase that begins.
        earlier: the phases before it, with `distiller.safetensors` in their folders.
        fresh: keep the new connectors and losses.

    Returns:
        the number of tensors of connectors and losses that were carried.
    """
    own, kept = distiller.state_dict(), dict[str, Any]()
    structures = [term.structure for term in distiller.objective.terms]
    for phase in earlier:
        if phase.fresh:
            kept = {}
        same = {term.label for term in phase.terms if term.structure in structures}
        file = phase.folder / DISTILLER_FILE
        if same and file.is_file():
            kept |= {name: value for name, value in load_file(file).items() if _carried(name, same)}
    kept = {name: value for name, value in kept.items() if name in own and own[name].shape == value.shape}
    kept = {} if fresh else kept
    student = read_student_weights(earlier[-1].folder, type(distiller.student))
    distiller.load_state_dict({**kept, **{STUDENT + name: value for name, value in student.items()}}, strict=False)
    return len(kept)


def _carried(name: str, terms: Iterable[str]) -> bool:
    kind, _, rest = name.partition(".")
    return kind in ("connectors", "conditioning") or (kind == "losses" and rest.partition(".")[0] in terms)


class PhasesMixin(TeachingTrainer):
    """Methods of `CanKDTrainer` that train in phases."""

    _objective: Objective
    keep_connectors: bool
    phases_ended: Sequence[dict[str, Any]]  # facts of each, for the card
    _in_phases = False
    _left: tuple[Any, Any] = (None, None)  # the objective before an earlier call, and that of its last phase

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if not self._in_phases:
            self.phases_ended = []
        return super().train(*args, **kwargs)

    def train_phases(self, phases: Sequence[Phase], resume: bool = False) -> Any:
        """Trains in phases, each with its share of the steps, its objective and learning rate.

        Each phase goes on with the student of the one before, and by default with its connectors; its optimizer and
        schedule are new. The last one trains in `args.output_dir`, the others in `phase-1-NAME` and so on in it, so
        that each has its own checkpoints and log.

        Args:
            phases: shares add up to 1. `distill` changes `terms` and `task_weight` of the trainer's objective,
                `training` the settings in `cankd_hf.training.phases.SETTINGS`; `data` is for recipes.
            resume: go on where an earlier call in the same folder stopped.

        Returns:
            what `train` returns for the last phase.

        Raises:
            InputError: for phases that cannot be trained, told before the first begins, and as `train`.
            KeyboardInterrupt: after Ctrl-C, with a checkpoint saved, as `train`.
        """
        base, args = self._objective, self.args
        if base is self._left[1]:  # by an earlier call
            base = self._left[0]
        objectives = self._checked(phases, base)
        loader: Any = self.get_train_dataloader()
        counts = steps_of([phase.share for phase in phases], self.set_initial_training_values(args, loader)[-1])
        out, earlier, result = Path(args.output_dir or ""), list[Ended](), None
        if not resume and any(place.is_dir() for place in out.glob("phase-*")):
            fix = "resume=True goes on with them, or name another folder"
            raise InputError(f"output_dir {out}: holds phases of an earlier training; {fix}")
        self.phases_ended, self._in_phases = [], True
        try:
            for number, (phase, objective, steps) in enumerate(zip(phases, objectives, counts, strict=True), 1):
                last = number == len(phases)
                folder = out if last else out / f"phase-{number}-{phase.name}"
                unscored = objective.task_weight == 0 < base.task_weight
                self.args = _arguments(args, phase, steps, None if last else folder, unscored)
                self.phases_ended = [*self.phases_ended, _facts(phase, objective, steps, self.args.learning_rate)]
                if resume and not last and (folder / STATE_FILE).is_file():
                    logger.warning("phase %s: finished before, kept (%s)", phase.name, folder)
                else:
                    self._begin(phase, objective, earlier)
                    result = self._train_phase(folder, resume)
                    if not last:
                        self._save_phase(folder)
                earlier.append(Ended(folder, objective.terms, phase.carry == "fresh"))
        finally:
            self.args, self.keep_connectors, self._in_phases = args, False, False
            self._left = base, self._objective
        return result

    def _checked(self, phases: Sequence[Phase], base: Objective) -> list[Objective]:
        """The objective of each phase; raises InputError with everything that is wrong with them."""
        problems = Problems()
        for key, message in phase_problems(phases):
            problems.say(key, message)
        made = []
        for index, phase in enumerate(phases):
            place = f"phases.{index}"
            problems.check(phase, place)
            if phase.data:
                problems.say(f"{place}.data", "is for recipes; make a CanKDTrainer with the images of this phase")
            for key in phase.training.keys() - SETTINGS:
                problems.say(f"{place}.training.{key}", f"is of the whole training; known here: {sorted(SETTINGS)}")
            for key in phase.distill.keys() - {"terms", "task_weight"}:
                problems.say(f"{place}.distill.{key}", "is of the whole training; terms and task_weight may change")
            given = phase.distill.get("terms", base.terms)
            try:
                terms = given if _are_terms(given) else problems.read(list[LossTerm], given, f"{place}.distill.terms")
                weight = phase.distill.get("task_weight", base.task_weight)
                made.append(Objective(weight, terms or [], phase.frozen or base.frozen, base.guard))
            except InputError as error:
                problems.take(error, place)
        problems.raise_all()
        for index, objective in enumerate(made):
            try:
                cast(Any, self).set_objective(objective)
            except InputError as error:
                raise InputError([f"phases.{index}: {problem}" for problem in error.problems]) from error
        cast(Any, self).set_objective(base)
        return made

    def _begin(self, phase: Phase, objective: Objective, earlier: Sequence[Ended]) -> None:
        """Makes student, connectors and random state those that the phase begins with, resumed or not."""
        cast(Any, self).set_objective(self._objective)  # drops what an earlier phase left of optimizer and schedule
        distiller, first = self.distiller, not earlier
        distiller.forget()
        cast(Any, self).set_objective(objective)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        seed = seed if first else derived_seed(seed, phase.name) % 2**32
        set_seed(self.args.seed if first else derived_seed(self.args.seed, phase.name) % 2**32)
        self.accelerator.dataloader_config.data_seed = seed  # another order of the images, and other views of them
        data: Any = self.train_dataset
        if isinstance(data, SeededDataset):
            data.seed = seed
        elif hasattr(data, "set_seed"):
            data.set_seed(seed)
        if not first:
            count = go_on(distiller, earlier, phase.carry == "fresh")
            told = f", with {count} tensors of connectors and losses" if count else ""
            logger.warning("phase %s: goes on with the student of %s%s", phase.name, earlier[-1].folder, told)

    def _train_phase(self, folder: Path, resume: bool) -> Any:
        found = chosen(folder, self.is_world_process_zero()) if resume else None
        return self.train(resume_from_checkpoint=None if found is None else str(found))

    def _save_phase(self, folder: Path) -> None:
        """Saves a phase that another one goes on from; its state last, by which it is known to have ended."""
        self.keep_connectors = True
        self.save_model(str(folder), _internal_call=True)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            self.state.save_to_json(str(folder / STATE_FILE))
        self.accelerator.wait_for_everyone()
        self.keep_connectors = False


def _are_terms(given: Any) -> bool:
    return isinstance(given, list | tuple) and all(isinstance(term, LossTerm) for term in given)


def _facts(phase: Phase, objective: Objective, steps: int, learning_rate: float) -> dict[str, Any]:
    """What a card says of a phase."""
    return {
        "name": phase.name,
        "share": phase.share,
        "steps": steps,
        "task_weight": objective.task_weight,
        "terms": [term.label for term in objective.terms],
        "frozen": list(objective.frozen),
        "learning_rate": learning_rate,
    }


def _arguments(args: CanKDConfig, phase: Phase, steps: int, folder: Path | None, unscored: bool) -> CanKDConfig:
    """The arguments of one phase; those of the last one, without a folder, push to the Hub where all do.

    A copy: making them anew would reset the state that accelerate shares with the trainer.
    """
    made = copy.copy(args)
    changes: dict[str, Any] = {**(_UNSCORED if unscored else {}), **phase.training, "max_steps": steps}
    if folder is not None:
        changes |= {"output_dir": str(folder), "push_to_hub": False}
    for key, value in changes.items():
        setattr(made, key, _WORDS[key](value) if key in _WORDS else value)
    return as_config(made)
