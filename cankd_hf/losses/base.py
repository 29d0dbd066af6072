"""Base classes of distillation losses: two tensors of one shape in, one unweighted scalar out.

Letters: B batch, C channels, H and W the size of the map, K classes, N queries.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cankd_hf._moved import left
from cankd_hf.errors import InputError

__getattr__ = left(__name__, "config.distill", "LossTerm")


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype losses compute in: float64 for float64 tensors, else float32 (bf16 sums over H*W are inaccurate)."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Context in which operations keep the types of their inputs; the meta device has no autocast to disable."""
    kind = device.type
    # torch.compile of some versions cannot trace the question, and is not asked it for the meta device
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
    return torch.autocast(kind, enabled=False) if known else nullcontext()


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the backward pass of an autograd function: without autocast, as the forward pass, and not twice.

    `backward()` runs under the autocast of its caller; a product in bfloat16 there would not fit one in float32.
    """

    @wraps(backward)
    def exact(ctx: Any, *grads: Tensor) -> Any:
        with without_autocast(grads[0].device):
            return backward(ctx, *grads)

    decorated: Callable[..., Any] = once_differentiable(exact)
    return decorated


class DistillationLoss(nn.Module):
    """A distance between a student tensor and a teacher tensor of the same shape.

    Derive from `FeatureLoss` or `LogitsLoss` and implement `compute`. Register learned values as parameters, so that
    the optimizer, DDP and checkpoints include them. Losses are built as `cls(size, **options)`.

    Attributes:
        reads: what the loss compares: feature `maps` (after a connector) or `logits` (unchanged).
        raw_maps: if True, `compute` gets the tensors in their own dtype, for losses that cast block by block to save
            memory; if False, both are cast to `compute_dtype` first.
        paper: arXiv id of the paper, for model cards.
        citation: BibTeX entry of the paper, for model cards.

    Args:
        size: channels C or classes K of both tensors.
    """

    reads: ClassVar[Literal["maps", "logits"]]
    raw_maps: ClassVar[bool] = False
    paper: ClassVar[str] = ""
    citation: ClassVar[str] = ""
    # name of `size` in the constructor and in messages; number of dimensions -> layout and the dimension of `size`
    _argument: ClassVar[str]
    _unit: ClassVar[str]
    _layouts: ClassVar[dict[int, tuple[str, int]]]

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 1:
            raise InputError(
                f"{type(self).__name__}.{self._argument}: expected at least 1, got {size}; pass the {self._unit} "
                f"of the {self.reads} the loss compares"
            )
        self.size = size

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The unweighted loss, computed with autocast disabled.

        Args:
            student: student tensor, of any floating-point dtype and memory format.
            teacher: teacher tensor of the same shape; no gradient flows into it.

        Returns:
            The loss [], float32 (float64 for float64 tensors).

        Raises:
            ValueError: the shapes differ, are not supported, or have another size than the loss was built for.
        """
        self.check(student, teacher)
        with without_autocast(student.device):
            teacher = teacher.detach()
            if not self.raw_maps:
                dtype = compute_dtype(student)
                student, teacher = student.to(dtype), teacher.to(dtype)
            return self.compute(student, teacher)

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss [] of two checked tensors; autocast is off and the teacher is detached."""
        raise NotImplementedError

    def branch_share(self, student: Tensor, teacher: Tensor) -> Tensor | None:
        """Norm of the learned branch relative to the student map, |output| / |s| [], or None without such a branch.

        A diagnostic without gradient: a share that grows while the raw similarity does not indicates that the
        parameters of the loss are learning rather than the student.
        """
        return None

    def check(self, student: Tensor, teacher: Tensor) -> None:
        """Raises a ValueError that names both shapes if the loss cannot compare the two tensors."""
        name, shapes = type(self).__name__, f"student {list(student.shape)} and teacher {list(teacher.shape)}"
        if student.shape != teacher.shape or student.dim() not in self._layouts:
            layouts = " or ".join(text for text, _ in self._layouts.values())
            advice = "put a connector between them" if self.reads == "maps" else "compare heads of one task and size"
            raise ValueError(f"{name}: expected two {self.reads} of one shape {layouts}, got {shapes}; {advice}")
        if student.shape[self._layouts[student.dim()][1]] != self.size:
            raise ValueError(
                f"{name}: expected {self.size} {self._unit}, got {shapes}; "
                f"build the loss with the {self._unit} of its {self.reads}"
            )
        if student.numel() == 0:
            raise ValueError(f"{name}: expected {self.reads} with at least one value, got {shapes}")

    def extra_repr(self) -> str:
        """The arguments shown by `print(loss)`."""
        return f"{self._argument}={self.size}"


class FeatureLoss(DistillationLoss):
    """A distance between a student map and a teacher map on one grid.

    Args:
        channels: channels C of both maps.

    Shape:
        student (after the connector) and teacher [B, C, H, W] -> [].

    Example:
        >>> class L1Loss(FeatureLoss):
        ...     def compute(self, student, teacher):
        ...         return (student - teacher).abs().mean()
        >>> L1Loss(8)(torch.zeros(2, 8, 4, 4), torch.ones(2, 8, 4, 4)).item()
        1.0
    """

    reads = "maps"
    _argument, _unit, _layouts = "channels", "channels", {4: ("[B, C, H, W]", 1)}

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.channels = channels


class LogitsLoss(DistillationLoss):
    """A distance between the logits of two heads for the same task, compared without a connector.

    Args:
        num_labels: classes K of both heads.

    Shape:
        student and teacher [B, K, H, W] (segmentation), [B, N, K] (detection, N queries) or [B, K] (an image) -> [].
    """

    reads = "logits"
    _argument, _unit = "num_labels", "classes"
    _layouts = {4: ("[B, K, H, W]", 1), 3: ("[B, N, K]", 2), 2: ("[B, K]", 1)}

    def __init__(self, num_labels: int) -> None:
        super().__init__(num_labels)
        self.num_labels = num_labels

    def class_dim(self, logits: Tensor) -> int:
        """The dimension of the classes: the last of [B, N, K], else the second."""
        return self._layouts[logits.dim()][1]
