"""Base classes of distillation losses: two tensors of one shape in, one unweighted scalar out.

Letters: B batch, C channels, H and W the size of the map, K classes, N queries.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, ClassVar, Literal, NamedTuple

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
    # torch.compile of some versions cannot trace the questions; the context costs the host as much as an operation
    on = torch.compiler.is_compiling() or (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind))
    return torch.autocast(kind, enabled=False) if on else nullcontext()


def run_in_type(module: nn.Module, x: Tensor) -> Tensor:
    """A part of a loss on a tensor, with its parameters in the tensor's type."""
    parameters = {name: parameter.to(x.dtype) for name, parameter in module.named_parameters()}
    result: Tensor = torch.func.functional_call(module, parameters, (x,))
    return result


def above_zero(loss: str, **options: float) -> None:
    """Raises an `InputError` that names every option of a loss that is not a finite number above 0."""
    _check(loss, options, "above 0", lambda value: value > 0)


def at_least_zero(loss: str, **options: float) -> None:
    """Raises an `InputError` that names every option of a loss that is not a finite number of at least 0."""
    _check(loss, options, "of at least 0", lambda value: value >= 0)


def at_most_one(loss: str, **options: float) -> None:
    """Raises an `InputError` that names every option of a loss that is not a fraction above 0, up to 1."""
    _check(loss, options, "above 0, at most 1", lambda value: 0 < value <= 1)


def one_of(loss: str, option: str, value: object, *known: str) -> None:
    """Raises an `InputError` for an option that has none of the known values."""
    if value not in known:
        raise InputError(f"{loss}.{option}: expected {' or '.join(known)}, got {value!r}; choose one of them")


def _check(loss: str, options: dict[str, float], wanted: str, holds: Callable[[float], bool]) -> None:
    problems = [
        f"{loss}.{key}: expected a number {wanted}, got {value!r}; leave it out for the default"
        for key, value in options.items()
        if not (isinstance(value, int | float) and holds(value) and value < float("inf"))
    ]
    if problems:
        raise InputError(problems)


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


class Seen(NamedTuple):
    """Two weights in 0..1 of each position of a batch.

    Attributes:
        seen: 0 where the student's picture was erased or is padding.
        valid: 0 on padding alone; sums are divided by the number of these, so that a loss over half of an image is
            half the loss.
    """

    seen: Tensor
    valid: Tensor

    def mean(self, each: Tensor) -> Tensor:
        """The mean [] of values at the positions, over the valid ones."""
        result: Tensor = (each * self.seen).sum() / self.valid.sum().clamp_min(1e-6)
        return result


class DistillationLoss(nn.Module):
    """A distance between a student tensor and a teacher tensor of the same shape.

    Derive from `FeatureLoss` or `LogitsLoss` and implement `compute`. Register learned values as parameters, so that
    the optimizer, DDP and checkpoints include them. Losses are built as `cls(size, **options)`.

    Attributes:
        reads: what the loss compares: feature `maps` (after a connector), `logits` (unchanged), the `dense`
            predictions of a detector (its class logits, boxes and centre-ness at every anchor), or the `queries` of a
            DETR-like one (class logits and boxes of each query). `boxes`: nothing; see `PseudoBoxesLoss`.
        extras: further arguments of `forward` and `compute`, optional ones, that the batch may have: its `labels`; for
            a loss that reads `dense` or `queries`, both models' `predictions`; for one that matches queries, the
            function to `assign` them; for one on logits of positions or anchors, `weights`: what is `Seen` of each,
            where some are not.
        raw_maps: if True, `compute` gets the tensors in their own dtype, for losses that cast block by block to save
            memory; if False, both are cast to `compute_dtype` first.
        paper: arXiv id of the paper, for model cards.
        citation: BibTeX entry of the paper, for model cards.

    Args:
        size: channels C or classes K of both tensors.
    """

    reads: ClassVar[Literal["maps", "logits", "dense", "queries", "boxes"]]
    extras: ClassVar[tuple[str, ...]] = ()
    raw_maps: ClassVar[bool] = False
    # whether what it compares is made by the teacher's head from the student's features
    crosses: ClassVar[bool] = False
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

    def forward(self, student: Tensor, teacher: Tensor, **extras: Any) -> Tensor:
        """The unweighted loss, computed with autocast disabled.

        Args:
            student: student tensor, of any floating-point dtype and memory format.
            teacher: teacher tensor of the same shape; no gradient flows into it.
            extras: what the loss names in `extras`, where there is some.

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
            return self.compute(student, teacher, **extras)

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss [] of two checked tensors; autocast is off and the teacher is detached.

        A loss with `extras` takes them as further optional arguments.
        """
        raise NotImplementedError

    def report(self, student: Tensor, teacher: Tensor, **extras: Any) -> dict[str, Tensor]:
        """Further numbers [] for the log by name, without gradient; asked for in steps that are logged.

        It gets all extras that the batch has, and returns the same names for each batch: nan where one is undefined.
        A last part after a slash that is a number stands for a class: `kept/3`.
        """
        return {}

    def branch_share(self, student: Tensor, teacher: Tensor) -> Tensor | None:
        """Norm of the learned branch relative to the student map, |output| / |s| [], or None without such a branch.

        A diagnostic without gradient: a share that grows while the raw similarity does not indicates that the
        parameters of the loss are learning rather than the student.
        """
        return None

    def without_branch(self, student: Tensor, teacher: Tensor) -> Tensor | None:
        """The loss [] with its learned branch switched off: the distance of the maps as they are, without gradient.

        None without such a branch. A loss that falls while this does not is learnt by the branch, not by the student.
        """
        return None

    def check(self, student: Tensor, teacher: Tensor) -> None:
        """Raises a ValueError that names both shapes if the loss cannot compare the two tensors."""
        layout = self._layouts.get(student.dim())
        if student.shape == teacher.shape and layout and student.shape[layout[1]] == self.size and student.numel():
            return
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

    reads: ClassVar[Literal["maps", "logits", "dense", "queries", "boxes"]] = "logits"
    # whether it makes no sense for heads with a sigmoid for each class, whose absolute scores a softmax loses
    needs_softmax: ClassVar[bool] = False
    # arguments of the constructor that the distiller fills in from the student's head, where they are "auto"
    of_head: ClassVar[tuple[str, ...]] = ()
    _argument, _unit = "num_labels", "classes"
    _layouts = {4: ("[B, K, H, W]", 1), 3: ("[B, N, K]", 2), 2: ("[B, K]", 1)}

    def __init__(self, num_labels: int) -> None:
        super().__init__(num_labels)
        self.num_labels = num_labels

    def needs_two_classes(self) -> None:
        """Raises an `InputError` for a single class, whose softmax is 1 whatever its logit."""
        if self.num_labels == 1:
            raise InputError(
                f"{type(self).__name__}.num_labels: expected at least 2, got 1: the softmax of one class is always 1; "
                "use `loss: kl` with `activation: sigmoid`, or a loss on maps"
            )

    def class_dim(self, logits: Tensor) -> int:
        """The dimension of the classes: the last of [B, N, K], else the second."""
        return self._layouts[logits.dim()][1]
