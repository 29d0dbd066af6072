"""The progress bar of a run: losses in the bar, and a short line for each evaluation."""

import sys
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# Smallest share of time spent waiting for data that is shown.
SHOWN_WAIT = 0.1
# Seconds between two lines of the bar if it is written to a file.
FILE_INTERVAL = 30.0


class TrainingProgress(ProgressCallback):
    """`ProgressCallback` that shows the losses in the bar, and `metric` after each evaluation, not every log."""

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
        # In a resumed run the time estimate must not count earlier steps.
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
    """Replaces the `ProgressCallback` in a list of callbacks; its notebook and printer variants are kept."""
    for position, callback in enumerate(callbacks):
        if type(callback) is ProgressCallback:
            callbacks[position] = TrainingProgress(metric)


def _shown(logs: dict[str, Any]) -> dict[str, str]:
    """The postfix of the bar: each term once, not each of its pairs, and the data wait if it is noticeable."""
    totals = [name for name in logs if name == "loss" or (name.startswith("loss_") and "/" not in name)]
    shown = {name.removeprefix("loss_"): f"{logs[name]:.3g}" for name in totals}
    correlations = [value for name, value in logs.items() if name.startswith("raw_correlation/")]
    if correlations:
        shown["raw_r"] = f"{sum(correlations) / len(correlations):.3g}"
    if logs.get("data_wait", 0.0) >= SHOWN_WAIT:
        shown["data_wait"] = f"{logs['data_wait']:.0%}"
    return shown
