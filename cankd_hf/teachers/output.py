"""What a teacher says about a batch of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class TeacherOutput(Sequence[Tensor]):
    """Feature maps and logits; as a sequence, the maps.

    Attributes:
        maps: `[B, C, H, W]` each, fine to coarse, in the teacher's dtype, without gradient.
        logits: what its head gives, `[B, K, H, W]` or `[B, N, K]`; None where nobody reads them, and the forward ended
            at the last map.
    """

    maps: list[Tensor]
    logits: Tensor | None = None

    def __len__(self) -> int:
        return len(self.maps)

    def __getitem__(self, index: Any) -> Any:
        return self.maps[index]
