"""The progress bar of a run: the losses beside the estimate, a short line for each evaluation."""

from __future__ import annotations

from typing import Any

from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments


class TrainingProgress(ProgressCallback):
    """`ProgressCallback` that shows what is learnt in the bar itself instead of printing every log as a dictionary.

    Args:
        metric: the score to show after each evaluation.
    """

    def __init__(self, metric: str) -> None:
        super().__init__()
        self.metric = metric

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
            # Each term once, not each of its levels.
            parts = {name.removeprefix("loss_"): value for name, value in logs.items() if _is_total(name)}
            correlations = [value for name, value in logs.items() if name.startswith("raw_correlation/")]
            if correlations:
                parts["raw_r"] = sum(correlations) / len(correlations)
            self.training_bar.set_postfix({name: f"{value:.3g}" for name, value in parts.items()})
        elif f"eval_{self.metric}" in logs:
            self.training_bar.write(
                f"step {state.global_step}: {self.metric} {logs[f'eval_{self.metric}']:.4f} (eval)"
            )


def _is_total(name: str) -> bool:
    return name == "loss" or (name.startswith("loss_") and "/" not in name)
