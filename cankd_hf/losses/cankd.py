"""CanKD (arXiv 2511.21503): student map s reads teacher map t through a non-local block, then both are compared.

    (1) query      q = theta(s)                                  [B, D, N]
    (2) key        k = pool(phi(t))                              [B, D, M]
    (3) value      v = pool(g(t))                                [B, D, M]
    (4) affinity   f_ij = <q_i, k_j> / M, or another             [B, N, M]
    (5) read       y_i = sum_j f_ij v_j                          [B, D, N]
    (6) output     o = w(y)                                      [B, C, N]
    (7) residual   z = norm(o) + s                               [B, C, N]
    (8) distance   L = 0.5 * mean over B, C, N of (IN(z) - IN(t))^2

theta, phi, g and w are 1x1 convolutions with bias, pool is a 2x2 max-pool (floor), norm is a BatchNorm whose weight
and bias start at 0, IN an instance norm without parameters. Equations are numbered here, in the paper's order.
`CanKDLoss.published` implements them as written; `CanKDLoss.compute` is equal, with gradients, in linear time:

    (1-6) o = mix x + bias, one channel matrix for each image, without f          (`affinities/`)
    (6-7) the moments of z over positions, from those of s, t and o, without z    (`kernels/`)
    (8)   L = 0.5 * mean over B, C of [var_z/(var_z+e) + var_t/(var_t+e) - 2 cov_zt/sqrt((var_z+e)(var_t+e))]

Letters: B batch, C channels, D hidden channels, K channels of x, N = H * W student positions (queries), M teacher
positions after pooling (keys).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cankd_hf.errors import InputError
from cankd_hf.losses.affinities import AFFINITIES, Block, Projections
from cankd_hf.losses.affinities.base import as_matrix
from cankd_hf.losses.base import FeatureLoss, above_zero, at_least_zero, compute_dtype, without_autocast
from cankd_hf.losses.cankd_options import check_options, warn_not_pooled
from cankd_hf.losses.instance_mse import InstanceMSELoss
from cankd_hf.losses.kernels.blocks import on_whole_maps
from cankd_hf.losses.kernels.moments import MixMoments, instance_distance, mix_moments, plain_distance
from cankd_hf.losses.kernels.output_norm import batch_affine, whole_norm
from cankd_hf.losses.kernels.whole import whole_dtype, whole_instance_distance

logger = logging.getLogger(__name__)


class CanKDLoss(FeatureLoss):
    """Cross-attention-based non-local knowledge distillation (arXiv 2511.21503), every variant the authors ablate.

    `y_i = sum_j f(theta(s_i), pool(phi(t))_j) pool(g(t))_j`, `z = norm(w(y)) + s` and
    `L = 0.5 * mean (IN(z) - IN(t))^2`. The paper's mu = 5 is a weight of 10 on this value, because of the 0.5.

    Args:
        channels: channels C of both maps.
        hidden_channels: D; None for C // 2 (at least 1), as published.
        affinity: f. "dot_product": `<q_i, k_j> / M` (no softmax, no 1/sqrt(D)); "embedded_gaussian": softmax over
            the keys of `<q_i, k_j>`, unscaled; "gaussian": softmax of `<s_i, pool(t)_j>` on the raw C channels,
            without theta and phi; "concatenation": `relu(a . q_i + b . k_j) / M`.
        subsample: pool keys and values by a 2x2 max-pool (floor). Maps with H or W of 1 are not pooled.
        output_norm: "batch" (BatchNorm2d whose weight and bias start at 0) or "none" (w itself starts at 0).
        normalization: "instance" (IN on z and t before the distance) or "none".
        residual: add the student map to the block's output.
        values: "teacher", as published, or "student": what is read are then the student's own positions, so that the
            block cannot copy the teacher's map (ours, not the paper's; GKD, arXiv 2603.02554, reads so too).
        gate: largest size of the branch, |output| / |s|, above which it is scaled down to it; None for no limit, as
            published (ours).
        fade: number of training passes over which the branch falls to 0, linearly, after which only the distance is
            left; 0 for never, as published (ours).

    Shape:
        student and teacher [B, C, H, W] -> [].

    Notes:
        No affinity keeps an [N, M] tensor; `docs/performance.md` derives the forms used. The published Gaussian has
        no form without sub-sampling (it crashes), this one has. Differentiable once.

    Example:
        >>> loss = CanKDLoss(8)
        >>> loss(torch.randn(2, 8, 6, 10), torch.randn(2, 8, 6, 10)).shape
        torch.Size([])
    """

    raw_maps = True
    attends: ClassVar[bool] = True  # whether it reads the teacher, so that its attention can be shown
    passes: Tensor
    paper = "2511.21503"
    citation = (
        "@inproceedings{sun2026cankd, title={CanKD: Cross-Attention-based Non-local operation for Feature-based "
        "Knowledge Distillation}, author={Sun and Ohyama}, booktitle={WACV}, year={2026}, "
        "note={arXiv:2511.21503}}"
    )

    def __init__(
        self,
        channels: int,
        hidden_channels: int | None = None,
        affinity: str = "dot_product",
        subsample: bool = True,
        output_norm: str | None = "batch",
        normalization: str | None = "instance",
        residual: bool = True,
        values: str = "teacher",
        gate: float | None = None,
        fade: int = 0,
    ) -> None:
        super().__init__(channels)
        hidden = max(channels // 2, 1) if hidden_channels is None else hidden_channels
        check_options(hidden, affinity, output_norm, normalization, values)
        above_zero("CanKDLoss", **({} if gate is None else {"gate": gate}))
        at_least_zero("CanKDLoss", fade=fade)
        self.hidden_channels = hidden
        self.affinity = affinity
        self.subsample = subsample
        self.normalization = normalization or "none"
        self.residual = residual
        self.values, self.gate, self.fade = values, gate, fade
        if fade:
            self.register_buffer("passes", torch.zeros(()))
        # modules for their parameters and default initialisation; `compute` uses their weights directly
        kind = AFFINITIES[affinity]
        self.theta = nn.Conv2d(channels, hidden, 1) if kind.embeds else None
        self.phi = nn.Conv2d(channels, hidden, 1) if kind.embeds else None
        self.g = nn.Conv2d(channels, hidden, 1)
        self.concat = kind.extra(hidden)  # of the authors' affinities the concatenation has one, hence the name
        self.w = nn.Conv2d(hidden, channels, 1)
        self.output_norm = nn.BatchNorm2d(channels) if output_norm == "batch" else None
        self.reset_output()

    def reset_output(self) -> None:
        """Sets the last layer of the block to 0, so that z = s: the initial state of every run."""
        last = self.w if self.output_norm is None else self.output_norm
        for parameter in last.parameters():
            nn.init.zeros_(parameter)

    def published(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """The equations as published, with f [B, N, M]: the reference for tests and timings of `compute`.

        Args:
            student: student map [B, C, H, W], in the dtype of the parameters.
            teacher: teacher map [B, C, H, W], in the same dtype.

        Returns:
            z [B, C, H, W] and the loss []. In train mode the running statistics are updated, as by `forward`.
        """
        o = self._published_output(student, teacher)  # (1) to (6)
        if self.output_norm is not None:
            o = self.output_norm(o)
        o = o * self._hold(o.square().sum(), student.square().sum(), self.training)
        z, t = o + student if self.residual else o, teacher  # (7)
        if self.normalization == "none":
            return z, 0.5 * F.mse_loss(z, t)
        return z, 0.5 * F.mse_loss(F.instance_norm(z), F.instance_norm(t))  # (8)

    def _published_output(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The output o [B, C, H, W] before its norm."""
        p = self.projections(student.dtype)
        f = self.affinity_matrix(student, teacher)  # (1), (2), (4)
        v = self._pool(p.g(student if self.values == "student" else teacher))  # (3)
        y = (f @ v.mT).mT  # (5)
        return p.w(y.unflatten(2, student.shape[2:]))  # (6)

    def affinity_matrix(self, student: Tensor, teacher: Tensor) -> Tensor:
        """f [B, N, M] of any N student positions [B, C, h, w] over a teacher map [B, C, H, W] of the same type."""
        p = self.projections(student.dtype)
        q = student if p.theta is None else p.theta(student)  # (1)
        k = self._pool(teacher if p.phi is None else p.phi(teacher))  # (2)
        return AFFINITIES[self.affinity].published(p, q.flatten(2), k)  # (4)

    def projections(self, dtype: torch.dtype | None) -> Projections:
        """The block's convolutions as matrices of the given type; None: their parameters as they are."""
        return Projections(
            theta=None if self.theta is None else as_matrix(self.theta, dtype),
            phi=None if self.phi is None else as_matrix(self.phi, dtype),
            g=as_matrix(self.g, dtype),
            w=as_matrix(self.w, dtype),
            extra=None if self.concat is None else self.concat.weight.flatten().to(dtype or self.concat.weight.dtype),
        )

    def pools(self, teacher: Tensor) -> bool:
        """Whether keys and values of a map [B, C, H, W] are pooled; warns once for a map too small to pool."""
        height, width = teacher.shape[2:]
        if self.subsample and min(height, width) < 2 and not torch.compiler.is_compiling():
            warn_not_pooled(height, width)
        return self.subsample and min(height, width) > 1

    def _pool(self, x: Tensor) -> Tensor:
        return (F.max_pool2d(x, 2) if self.pools(x) else x).flatten(2)

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss [] of two checked maps [B, C, H, W], from moments, without f or normalised maps in memory."""
        if on_whole_maps(student.device):
            return self._compute_whole(student, teacher)
        m, mean, scale = self._moments(student, teacher, update=self.training)  # (1) to (6)
        var, cov_zt = scale.square() * m.var_o, scale * m.cov_ot
        if self.residual:  # (7)
            mean, cov_zt = mean + m.mean_s, cov_zt + m.cov_st
            # a variance by definition; rounding could leave it below 0 where the output cancels the student
            var = (var + 2 * scale * m.cov_so + m.var_s).clamp_min(0)
        if self.normalization == "none":
            return plain_distance(mean, m.mean_t, var, m.var_t, cov_zt)
        # the mean is normalised away; it stays in the graph so that w.bias gets its zero gradient, as DDP expects
        return instance_distance(var, m.var_t, cov_zt) + 0 * mean.sum()  # (8)

    def _compute_whole(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The same with z in memory, in few operations on whole maps."""
        s, t = self._whole_maps(student, teacher)
        wide = compute_dtype(student)
        if self.attends and self.values == "teacher" and self.gate is None and not self.fade:
            p, kind = self.projections(None), AFFINITIES[self.affinity]
            z = kind.transformed(p, s, t, self.pools(t), self.output_norm, self.residual)  # (1) to (7)
        else:  # what is ours and not published
            z = self._whole_output(s, t)
            z = z if self.output_norm is None else whole_norm(self.output_norm, z)
            output, ours = (torch.linalg.vector_norm(x.detach(), dtype=wide).square() for x in (z, s))
            z = z * self._hold(output, ours, self.training).to(z.dtype)
            z = z + s if self.residual else z
        if self.normalization == "none":
            return 0.5 * F.mse_loss(z.to(wide), t.to(wide))
        return whole_instance_distance(z, t, wide)  # (8)

    def _whole_maps(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Both maps with one copy each, for their type and for the order in memory, if any."""
        dtype = whole_dtype(student) if AFFINITIES[self.affinity].narrow else compute_dtype(student)
        # `to` leaves slices as they are
        s, t = (x.to(dtype, memory_format=torch.contiguous_format).contiguous() for x in (student, teacher))
        return s, t

    def _whole_output(self, s: Tensor, t: Tensor) -> Tensor:
        """Equations 1 to 6 without the norm, o [B, C, H, W], of `_whole_maps`."""
        if self.values == "student":
            return self._mixed(s, t).view_as(s)
        return AFFINITIES[self.affinity].output(self.projections(None), s, t, self.pools(t))

    def _moments(self, student: Tensor, teacher: Tensor, update: bool) -> tuple[MixMoments, Tensor, Tensor]:
        """Moments of s, t and o; the output's mean [B, C] after its norm; and the norm's scale [C]."""
        # flattened once: gradients of one tensor are accumulated in place, those of two views in a new tensor
        flat = student.flatten(2)
        mix, bias, x = self._block(flat, teacher)
        m = mix_moments(flat, teacher.flatten(2), mix, x)
        mean_o = m.mean_o + bias
        scale, shift = self._norm(mean_o, m.var_o, student, update)
        mean = scale * mean_o + shift
        if self.gate is not None or self.fade:
            output, ours = (scale.square() * m.var_o + mean.square()).sum(), (m.var_s + m.mean_s.square()).sum()
            held = self._hold(output, ours, update)
            return m, held * mean, held * scale
        return m, mean, scale

    @torch.no_grad()
    def _hold(self, output: Tensor, student: Tensor, update: bool) -> Tensor:
        """What the branch is multiplied by [], from sums of squares of output and student map; no gradient."""
        held = output.new_ones(())
        if self.gate is not None:
            held = (self.gate * (student / output.clamp_min(torch.finfo(output.dtype).tiny)).sqrt()).clamp_max(1)
        if self.fade:
            held = held * (1 - self.passes / self.fade).clamp_min(0).to(held.dtype)
            self.passes += int(update)
        return held

    def _block(self, student: Tensor, teacher: Tensor) -> Block:
        """Equations 1 to 6 without the norm, of a student map [B, C, N] and a teacher map [B, C, H, W]."""
        p = self.projections(compute_dtype(student))
        if self.values == "student":
            p = p._replace(source=student.view(teacher.shape))
        return AFFINITIES[self.affinity].block(p, student, teacher, self.pools(teacher))

    def _norm(self, mean_o: Tensor, var_o: Tensor, student: Tensor, update: bool) -> tuple[Tensor, Tensor]:
        """The output norm as scale and shift of each channel, [C]."""
        if self.output_norm is None:
            return mean_o.new_ones(self.channels), mean_o.new_zeros(self.channels)
        return batch_affine(self.output_norm, mean_o, var_o, student.shape[2] * student.shape[3], update)

    def transform(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The transformed student map z [B, C, H, W], before normalisation, for visualisation.

        In train mode it uses the statistics of the batch, as `forward` does, without updating the running ones.
        """
        self.check(student, teacher)
        with without_autocast(student.device):
            output = self._branch(student, teacher.detach())
            return output + student.to(output.dtype) if self.residual else output

    def _branch(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The block's output after its norm [B, C, H, W], in memory; running statistics are left as they are."""
        o = self._output(student, teacher)
        scale, shift = self._norm(o.mean(-1), o.var(-1, correction=0), student, update=False)
        output = (scale[..., None] * o + shift[..., None]).view_as(student)
        return output * self._hold(output.square().sum(), student.to(output.dtype).square().sum(), update=False)

    @torch.no_grad()
    def branch_share(self, student: Tensor, teacher: Tensor) -> Tensor:
        """|output| / |s| [] over the whole batch, the relative size of the block's output. 0 at the start of a run."""
        self.check(student, teacher)
        with without_autocast(student.device):
            if on_whole_maps(student.device):
                branch = self._branch(student, teacher)
                output, of_student = branch.square().mean(), student.to(branch.dtype).square().mean()
            else:
                m, mean, scale = self._moments(student, teacher, update=False)
                output = (scale.square() * m.var_o + mean.square()).sum()
                of_student = (m.var_s + m.mean_s.square()).sum()
            return (output / of_student.clamp_min(1e-24)).sqrt()

    @torch.no_grad()
    def without_branch(self, student: Tensor, teacher: Tensor) -> Tensor | None:
        """Equation 8 for z = s [], as at the start of a run; None without the residual, which leaves nothing then."""
        if not self.residual:
            return None
        if self.normalization == "none":
            return 0.5 * F.mse_loss(student.to(compute_dtype(student)), teacher.to(compute_dtype(student)))
        return InstanceMSELoss(self.channels).forward(student, teacher)

    def _output(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Equations 1 to 6 without the norm in memory, o [B, C, N]."""
        dtype = compute_dtype(student)
        if on_whole_maps(student.device):
            s, t = self._whole_maps(student, teacher)
            return self._whole_output(s, t).flatten(2).to(dtype)
        return self._mixed(student, teacher)

    def _mixed(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The same from the block."""
        flat = student.flatten(2)
        mix, bias, x = self._block(flat, teacher)
        return torch.baddbmm(bias[..., None], mix, flat.to(mix.dtype) if x is None else x)

    @classmethod
    def from_reference(cls, state_dict: Mapping[str, Tensor], **options: Any) -> CanKDLoss:
        """Build the loss from the authors' state dict (parameter names `non_local_att.*`, any prefix).

        Args:
            state_dict: tensors of one block; channels, hidden channels, affinity family, sub-sampling and output
                norm are read from names and shapes.
            options: arguments that cannot be read from the names (residual, normalization, affinity
                "embedded_gaussian", whose names are those of the dot product); they take precedence.

        Raises:
            InputError: for keys that are unknown, missing or of another shape.
        """
        ours = {_our_name(key): value for key, value in state_dict.items()}
        if "g.weight" not in ours:
            raise InputError(
                f"from_reference: expected keys like non_local_att.g.weight, got {sorted(state_dict)}; "
                "pass the state dict of one distillation block"
            )
        hidden, channels = ours["g.weight"].shape[:2]
        family = "dot_product" if "theta.weight" in ours else "gaussian"
        found = {
            "affinity": "concatenation" if "concat.weight" in ours else family,
            "subsample": any(re.search(r"non_local_att\.g\.0\.", key) for key in state_dict),
            "output_norm": "batch" if "output_norm.weight" in ours else "none",
        }
        loss = cls(channels, **{"hidden_channels": hidden, **found, **options}).to(ours["g.weight"])
        try:
            loss.load_state_dict(ours)
        except RuntimeError as error:
            raise InputError(
                f"from_reference: expected the parameters of one block, got others: {error}; pass the "
                "options the block was trained with"
            ) from error
        return loss

    def extra_repr(self) -> str:
        """The arguments shown by `print(loss)`."""
        return (
            f"channels={self.channels}, hidden_channels={self.hidden_channels}, affinity={self.affinity}, "
            f"subsample={self.subsample}, normalization={self.normalization}, residual={self.residual}"
        )


# The authors' parameter names and ours (their ".0" is there when a pooling or norm layer follows the convolution).
REFERENCE_NAMES = (
    (r"(?:.*\.)?non_local_att\.att\.theta\.", "theta."),
    (r"(?:.*\.)?non_local_att\.att\.phi\.(?:0\.)?", "phi."),
    (r"(?:.*\.)?non_local_att\.att\.concatination\.0\.", "concat."),
    (r"(?:.*\.)?non_local_att\.g\.(?:0\.)?", "g."),
    (r"(?:.*\.)?non_local_att\.W\.1\.", "output_norm."),
    (r"(?:.*\.)?non_local_att\.W\.(?:0\.)?", "w."),
)


def _our_name(key: str) -> str:
    for pattern, name in REFERENCE_NAMES:
        ours, count = re.subn("^" + pattern, name, key)
        if count:
            return ours
    return key
