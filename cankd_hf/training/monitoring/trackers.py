"""Groups of charts in trackers; transformers itself puts everything logged in training under `train/`."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback, integration_utils

# Prefix of a name in the log history -> prefix in a tracker; all other names get `train/`.
GROUPS = {
    "eval_": "eval/",
    "test_": "test/",
    "validation_": "validation/",
    "loss_": "loss/",
    "raw_": "similarity/",
    "held_": "held_out/",
    "branch_share/": "branch_share/",
    "gradient_share/": "gradient_share/",
}


def grouped(logs: Mapping[str, Any]) -> dict[str, Any]:
    """The same values under the names used in trackers: `loss_cankd/s0t0` -> `loss/cankd/s0t0`.

    TensorBoard writes `_` for spaces and signs; names that would become one, as of the classes `road sign` and
    `road_sign`, get a number.
    """
    counts: Counter[str] = Counter()
    named: dict[str, Any] = {}
    for name, value in logs.items():
        place = _place(name)
        plain = re.sub(r"[^-/\w.]", "_", place)
        counts[plain] += 1
        named[place if counts[plain] == 1 else f"{place}_{counts[plain]}"] = value
    return named


def _place(name: str) -> str:
    for start, group in GROUPS.items():
        if name.startswith(start):
            return group + name.removeprefix(start)
    return f"train/{name}"


class _Grouped(TrainerCallback):
    """Mixin for the tracker callbacks of transformers that logs under grouped names."""

    def on_log(self, args: TrainingArguments, state: Any, control: Any, *others: Any, **kwargs: Any) -> Any:
        with patch.object(integration_utils, "rewrite_logs", grouped):
            return super().on_log(args, state, control, *others, **kwargs)


class GroupedTensorBoard(_Grouped, TensorBoardCallback):
    """`TensorBoardCallback` with grouped names."""


class GroupedTrackio(_Grouped, TrackioCallback):
    """`TrackioCallback` with grouped names."""


class GroupedWandb(_Grouped, WandbCallback):
    """`WandbCallback` with grouped names, and one W&B run for each training of a process.

    transformers leaves a run open for values logged after training, such as test scores; without this, the next
    trainer would write into the same run, from step 0.
    """

    # The run that a finished training opened; a run opened by the user is never closed here.
    _left: Any = None

    def setup(self, args: TrainingArguments, state: TrainerState, model: Any, **kwargs: Any) -> None:
        if self._wandb.run is not None and self._wandb.run is GroupedWandb._left:
            self._wandb.finish()
        opens = self._wandb.run is None
        super().setup(args, state, model, **kwargs)  # type: ignore[no-untyped-call]
        self._opened = self._wandb.run if opens else None

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, *others: Any, **kwargs: Any) -> None:
        super().on_train_end(args, state, control, *others, **kwargs)
        if self._initialized:
            GroupedWandb._left = self._opened


GROUPED: dict[type, type[TrainerCallback]] = {
    TensorBoardCallback: GroupedTensorBoard,
    WandbCallback: GroupedWandb,
    TrackioCallback: GroupedTrackio,
}


def group_names(callbacks: list[TrainerCallback]) -> None:
    """Replaces transformers' callbacks of these three trackers in a list; all others are kept.

    Attributes of a callback, such as a TensorBoard writer, are copied to its replacement.
    """
    for position, callback in enumerate(callbacks):
        kind = GROUPED.get(type(callback))
        if kind is not None:
            callbacks[position] = kind()
            vars(callbacks[position]).update(vars(callback))
