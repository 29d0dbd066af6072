"""The control for what the Can block reads of the teacher: one linear map for all images in its place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cankd_hf.losses.affinities import Block
from cankd_hf.losses.affinities.base import as_matrix
from cankd_hf.losses.base import compute_dtype
from cankd_hf.losses.cankd import CanKDLoss


class StaticLinearLoss(CanKDLoss):
    """CanKD whose block does not see the teacher: `z = norm(w(theta(s))) + s` (a control of ours, not the paper's).

    Without a softmax the Can block is a linear map of the student's channels that depends on the image only through
    the second moments of the teacher's map. Here that map is learned and the same for all images: what `cankd` gains
    over this loss is what it reads of the teacher, and what this one gains over `instance_mse` is a linear adapter.

    Args:
        channels: channels C of both maps.
        hidden_channels: D; None for C // 2 (at least 1).
        output_norm: "batch" (BatchNorm2d whose weight and bias start at 0) or "none" (w itself starts at 0).
        normalization: "instance" (IN on z and t before the distance) or "none".
        residual: add the student map to the output.

    Shape:
        student and teacher [B, C, H, W] -> [].

    Notes:
        Differentiable once.
    """

    attends = False

    def __init__(
        self,
        channels: int,
        hidden_channels: int | None = None,
        output_norm: str | None = "batch",
        normalization: str | None = "instance",
        residual: bool = True,
    ) -> None:
        super().__init__(
            channels,
            hidden_channels,
            subsample=False,
            output_norm=output_norm,
            normalization=normalization,
            residual=residual,
        )
        del self.phi, self.g
        self.theta = nn.Conv2d(channels, self.hidden_channels, 1, bias=False)  # a bias would only move all cells alike

    def _published_output(self, student: Tensor, teacher: Tensor) -> Tensor:
        w = as_matrix(self.w, student.dtype)
        return w(F.conv2d(student, self._theta(student.dtype)[..., None, None]))

    def _block(self, student: Tensor, teacher: Tensor) -> Block:
        dtype = compute_dtype(student)
        w = as_matrix(self.w, dtype)
        mix = w.weight @ self._theta(dtype)
        return Block(mix.expand(len(student), -1, -1), w.bias.expand(len(student), -1), None)

    def _whole_output(self, s: Tensor, t: Tensor) -> Tensor:
        return self._mixed(s, t).view_as(s)

    def _theta(self, dtype: torch.dtype) -> Tensor:
        assert self.theta is not None
        return self.theta.weight.flatten(1).to(dtype)

    def extra_repr(self) -> str:
        """The arguments shown by `print(loss)`."""
        return f"channels={self.channels}, hidden_channels={self.hidden_channels}, residual={self.residual}"
