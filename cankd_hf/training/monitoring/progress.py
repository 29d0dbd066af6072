"""The progress bar of a run: the losses beside the estimate, a short line for each evaluation."""

import sys
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# Waiting for data is shown from this share of the time on.
SHOWN_WAIT = 0.1
# Seconds between two states of the bar where they are lines of a file.
FILE_INTERVAL = 30.0


class TrainingProgress(ProgressCallback):
    """`ProgressCallback` that shows the losses in the bar and `metric` after each evaluation, not whole dictionaries."""

    def __init__(self, metric: str) -> None:
        super().__init__()
        self.metric = metric
        self._on_terminal = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        bar = self.training_bar
        if bar is None:
            return
        # A resumed run: the estimate must not take the steps of before for steps of no time.
        self.current_step = bar.initial = bar.n = bar.last_print_n = state.global_step
        self._on_terminal = sys.stderr.isatty()
        if not self._on_terminal:
            bar.mininterval = FILE_INTERVAL

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        if "loss" in logs:
            self.training_bar.set_postfix(_shown(logs), refresh=self._on_terminal)
            return
        name = next((name for name in (self.metric, "loss") if f"eval_{name}" in logs), None)
        if name is not None:
            self.training_bar.write(f"step {state.global_step}: {name} {logs[f'eval_{name}']:.4f} (eval)")


def show_progress(callbacks: list[TrainerCallback], metric: str) -> None:
    """Replaces transformers' plain bar in a list of callbacks; a notebook's table and a printer stay."""
    for position, callback in enumerate(callbacks):
        if type(callback) is ProgressCallback:
            callbacks[position] = TrainingProgress(metric)


def _shown(logs: dict[str, Any]) -> dict[str, str]:
    """The postfix of the bar: each term once, not each of its levels, and the data wait where it is noticeable."""
    totals = [name for name in logs if name == "loss" or (name.startswith("loss_") and "/" not in name)]
    shown = {name.removeprefix("loss_"): f"{logs[name]:.3g}" for name in totals}
    correlations = [value for name, value in logs.items() if name.startswith("raw_correlation/")]
    if correlations:
        shown["raw_r"] = f"{sum(correlations) / len(correlations):.3g}"
    if logs.get("data_wait", 0.0) >= SHOWN_WAIT:
        shown["data_wait"] = f"{logs['data_wait']:.0%}"
    return shown
