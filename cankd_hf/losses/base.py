"""What every feature loss is, and how one is placed in the objective.

Letters: B batch, C channels, H and W the size of the map.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from cankd_hf.errors import InputError


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The type losses compute in: float64 for float64 maps, float32 for all others (bf16 sums over H*W are noise)."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class FeatureLoss(nn.Module):
    reads: ClassVar[str] = "maps"

    """A distance between a student map and a teacher map: tensors in, one unweighted scalar out.

    Subclasses are built as `LOSSES[name](channels, **options)` and implement `compute`. Whatever they learn is
    registered as parameters, so that the optimizer, DDP and checkpoints see it.

    Args:
        channels: channels C of both maps.

    Shape:
        student and teacher [B, C, H, W] -> [].
    """

    paper: ClassVar[str] = ""
    citation: ClassVar[str] = ""

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 1:
            raise InputError(
                f"{type(self).__name__}.channels: expected at least 1, got {channels}; pass the channels "
                "of the maps the loss compares"
            )
        self.channels = channels

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The unweighted loss, whatever the autocast state around it.

        Args:
            student: student map after the connector, [B, C, H, W], any floating type and memory format.
            teacher: teacher map on the same grid, [B, C, H, W]; no gradient flows into it.

        Returns:
            The loss [], float32 (float64 for float64 maps).

        Raises:
            ValueError: the maps differ in shape, are not 4-D, or have other channels than the loss was built for.
        """
        self._check_maps(student, teacher)
        with torch.autocast(device_type=student.device.type, enabled=False):
            return self.compute(student, teacher.detach())

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss [] of two checked maps [B, C, H, W] with autocast off; casts to `compute_dtype` itself."""
        raise NotImplementedError

    def branch_share(self, student: Tensor, teacher: Tensor) -> Tensor | None:
        """Size of the learned branch beside the student map, |output| / |s| [], or None for a loss without one.

        A diagnostic without gradient: a share that grows while the raw similarity stands still says that the loss
        falls in its own parameters and not in the student.
        """
        return None

    def extra_repr(self) -> str:
        """The arguments shown by `print(loss)`."""
        return f"channels={self.channels}"

    def _check_maps(self, student: Tensor, teacher: Tensor) -> None:
        shapes = f"student {list(student.shape)} and teacher {list(teacher.shape)}"
        if student.dim() != 4 or student.shape != teacher.shape:
            raise ValueError(
                f"{type(self).__name__}: expected two maps of one shape [B, C, H, W], got {shapes}; "
                "put a connector between them"
            )
        if student.shape[1] != self.channels:
            raise ValueError(
                f"{type(self).__name__}: expected {self.channels} channels, got {shapes}; "
                "build the loss with the channels of its maps"
            )
        if student.numel() == 0:
            raise ValueError(f"{type(self).__name__}: expected maps with at least one value, got {shapes}")


DistillationLoss = FeatureLoss
