"""What a `Distiller` returns for a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class DistillerOutput(ModelOutput):
    """Output of a `Distiller`; what else the student's own output has (`pred_boxes`) is read through it.

    Attributes:
        loss: the weighted sum of all parts [], with gradient; None if there are no parts.
        logits: of the student, with gradient; None for a backbone.
        parts: the unweighted losses [] by name, detached: `task`, then each term at each pair (`cankd/s0t0`).
        similarity: raw correlation and CKA of each image [B] by name (`cka/s0t0`), if measured.
        branch_share: norm of each Can block's output relative to the student map [] by name, if measured.
        reports: further numbers [] of losses on logits by name (`recall/dense_logits`), if measured.
        plain: the losses [] that have a learned branch, with it switched off, by name, if measured in eval mode.
        outputs: the student's own output; None, and `logits` without gradient, where only the loss is asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    parts: dict[str, Tensor] | None = None
    similarity: dict[str, Tensor] | None = None
    branch_share: dict[str, Tensor] | None = None
    reports: dict[str, Tensor] | None = None
    plain: dict[str, Tensor] | None = None
    outputs: Any = None

    def __getattr__(self, name: str) -> Any:
        own = vars(self).get("outputs")
        if own is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__} has no {name!r}, and neither has the student's output")
        return getattr(own, name)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str) and key not in self.keys() and self.outputs is not None:
            return self.outputs[key]
        return super().__getitem__(key)  # type: ignore[no-untyped-call]
