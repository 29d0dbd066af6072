"""Groups for the charts of a tracker: transformers puts all that is logged in training under `train/`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

# How a name in the log history begins -> how it begins in a tracker; all other names come under `train/`.
GROUPS = {
    "eval_": "eval/",
    "test_": "test/",
    "validation_": "validation/",
    "loss_": "loss/",
    "raw_": "similarity/",
    "branch_share/": "branch_share/",
}
# One number for the whole run: no curve.
SUMMARY = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")


def grouped(logs: Mapping[str, Any]) -> dict[str, Any]:
    """The same values under the names that trackers show: `loss_cankd/s0t0` -> `loss/cankd/s0t0`."""
    return {_place(name): value for name, value in logs.items()}


def _place(name: str) -> str:
    for start, group in GROUPS.items():
        if name.startswith(start):
            return group + name.removeprefix(start)
    return f"train/{name}"


class GroupedTensorBoard(TensorBoardCallback):
    """`TensorBoardCallback` with grouped names."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero:
            return
        if self.tb_writer is None:
            self._init_summary_writer(args)
        for name, value in grouped(logs or {}).items():
            if isinstance(value, (int, float)):
                self.tb_writer.add_scalar(name, value, state.global_step)
            else:
                self.tb_writer.add_text(name, str(value), state.global_step)
        self.tb_writer.flush()


class GroupedWandb(WandbCallback):
    """`WandbCallback` with grouped names, and one W&B run for each training of a process.

    transformers leaves a run open for what is logged after the training, such as test scores; the next trainer would
    go on writing into it, from step 0.
    """

    # The run that a training opened that has ended; a run opened by the user is never closed here.
    _left: Any = None

    def setup(self, args: TrainingArguments, state: TrainerState, model: Any, **kwargs: Any) -> None:
        if self._wandb.run is not None and self._wandb.run is GroupedWandb._left:
            self._wandb.finish()
        opens = self._wandb.run is None
        super().setup(args, state, model, **kwargs)
        self._opened = self._wandb.run if opens else None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_end(args, state, control, **kwargs)
        if self._initialized:
            GroupedWandb._left = self._opened

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not self._initialized:
            self.setup(args, state, model)
        if not state.is_world_process_zero:
            return
        curves = dict(logs or {})
        for name in SUMMARY:
            if name in curves:
                self._wandb.run.summary[name] = curves.pop(name)
        self._wandb.log({**grouped(curves), "train/global_step": state.global_step})


class GroupedTrackio(TrackioCallback):
    """`TrackioCallback` with grouped names."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not self._initialized:
            self.setup(args, state, model)
        if state.is_world_process_zero:
            curves = {name: value for name, value in (logs or {}).items() if name not in SUMMARY}
            self._trackio.log({**grouped(curves), "train/global_step": state.global_step})


GROUPED: dict[type, type[TrainerCallback]] = {
    TensorBoardCallback: GroupedTensorBoard,
    WandbCallback: GroupedWandb,
    TrackioCallback: GroupedTrackio,
}


def group_names(callbacks: list[TrainerCallback]) -> None:
    """Replaces transformers' own callbacks of these three trackers in a list; all others stay as they are.

    What a callback was given (a TensorBoard writer) goes over to the one in its place.
    """
    for position, callback in enumerate(callbacks):
        kind = GROUPED.get(type(callback))
        if kind is not None:
            callbacks[position] = kind()
            vars(callbacks[position]).update(vars(callback))
