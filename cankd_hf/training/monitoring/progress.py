"""The progress of a run: a bar on a terminal, a line now and then elsewhere, and a line for each evaluation."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# Smallest share of time spent waiting for data that is shown.
SHOWN_WAIT = 0.1
# Seconds between two lines where the output is no terminal.
FILE_INTERVAL = 30.0
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
LEAST_BAR = 6  # columns of the bar itself; what is beside it is left out for it


class TrainingProgress(ProgressCallback):
    """`ProgressCallback` that shows the losses and the time that is left, and `metric` after each evaluation.

    On a terminal the bar fits its width: what does not fit, the last losses first, is left out. Elsewhere a line is
    written every 30 seconds.

    Attributes:
        whole: gives the seconds that are left of the whole run, where a training is one part of it, or None.
    """

    def __init__(self, metric: str) -> None:
        super().__init__()
        self.metric = metric
        self.whole: Callable[[], float | None] | None = None
        self._shown: dict[str, str] = {}
        self._on_terminal = True
        self._started = self._told = 0.0
        self._first = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.current_step = self._first = state.global_step  # in a resumed run, earlier steps count for no time
        self._started = self._told = time.monotonic()
        self._shown, self._on_terminal = {}, sys.stderr.isatty()
        if state.is_world_process_zero:
            made = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                dynamic_ncols=True,
                bar_format=BAR,
                disable=not self._on_terminal,
            )
            self.training_bar = made

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        now = time.monotonic()
        if state.is_world_process_zero and now - self._told >= (1.0 if self._on_terminal else FILE_INTERVAL):
            self._told = now
            if self._on_terminal:
                self._fit()
            else:
                self._say(self._line(state))
        super().on_step_end(args, state, control, **kwargs)  # type: ignore[no-untyped-call]

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if not sys.stderr.isatty():
            return
        super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)  # type: ignore[no-untyped-call]
        if self.prediction_bar is not None and not self.prediction_bar.desc:
            self.prediction_bar.bar_format = "{desc}: " + BAR
            self.prediction_bar.leave = False
            self.prediction_bar.set_description_str("evaluating" if self.training_bar is not None else "scoring")

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
            self._shown = _shown(logs)
            self._fit()
            self.training_bar.refresh()
            return
        name = next((name for name in (self.metric, "loss") if f"eval_{name}" in logs), None)
        if name is not None:
            self._say(f"step {state.global_step}: {name} {logs[f'eval_{name}']:.4f} (eval)")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and not self._on_terminal:
            self._say(self._line(state))
        super().on_train_end(args, state, control, **kwargs)  # type: ignore[no-untyped-call]

    def _say(self, line: str) -> None:
        """A line of its own, above the bar."""
        tqdm.write(line, file=sys.stderr)

    def _left(self) -> dict[str, str]:
        left = self.whole() if self.whole is not None else None
        return {} if left is None else {"whole run": tqdm.format_interval(left)}

    def _fit(self) -> None:
        """Sets what is shown beside the bar, as much of it as fits the terminal."""
        bar = self.training_bar
        if bar is None or not self._on_terminal:
            return
        parts = [f"{name} {value}" for name, value in {**self._left(), **self._shown}.items()]
        facts = {**bar.format_dict, "postfix": None, "bar_format": BAR.replace("{bar}", "")}
        room = (facts["ncols"] or 80) - len(bar.format_meter(**{**facts, "ncols": None})) - LEAST_BAR - 1
        while parts and len(", ".join(["", *parts])) > room:
            parts.pop()
        bar.set_postfix_str(", ".join(parts), refresh=False)

    def _line(self, state: TrainerState) -> str:
        """Where a training is, for a file."""
        spent, done = time.monotonic() - self._started, state.global_step - self._first
        left = spent / max(1, done) * (state.max_steps - state.global_step)
        said = [f"step {state.global_step} of {state.max_steps} ({state.global_step / max(1, state.max_steps):.0%})"]
        said += [f"{tqdm.format_interval(spent)} spent", f"{tqdm.format_interval(left)} left"]
        said += [f"{value} of the whole run" for value in self._left().values()]
        return ", ".join([*said, *(f"{name} {value}" for name, value in self._shown.items())])


def show_progress(callbacks: list[TrainerCallback], metric: str) -> TrainingProgress | None:
    """Replaces the `ProgressCallback` in a list of callbacks; its notebook and printer variants are kept.

    Returns:
        What took its place, if anything.
    """
    made = None
    for position, callback in enumerate(callbacks):
        if type(callback) is ProgressCallback:
            callbacks[position] = made = TrainingProgress(metric)
    return made


def _shown(logs: Mapping[str, Any]) -> dict[str, str]:
    """What is shown of the logs: each term once, not each of its pairs, and the data wait if it is noticeable."""
    totals = [name for name in logs if name == "loss" or (name.startswith("loss_") and "/" not in name)]
    if len(totals) == 2 and logs.get("loss_task") == logs["loss"]:
        totals.remove("loss_task")  # the same number twice
    shown = {name.removeprefix("loss_"): f"{logs[name]:.3g}" for name in totals}
    correlations = [value for name, value in logs.items() if name.startswith("raw_correlation/")]
    if correlations:
        shown["raw_r"] = f"{sum(correlations) / len(correlations):.3g}"
    if logs.get("data_wait", 0.0) >= SHOWN_WAIT:
        shown["data_wait"] = f"{logs['data_wait']:.0%}"
    return shown
