"""Conditioning of a teacher's map before a loss compares it: one scale for targets of any scale.

`layer` and `l2` look at each cell by itself. The others use statistics of the teacher's maps, measured once, then
frozen and saved in the buffers. Letters: B batch, C channels, N cells.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cankd_hf.errors import InputError
from cankd_hf.losses.base import compute_dtype, without_autocast

EPS = 1e-6
DEAD = 1e-4  # of the median variance of the channels: the least variance that a channel is divided by
BINS, OCTAVES = 4096, 64  # of the histogram of the cells' lengths, which covers 2^-32 to 2^32
FENCE = 3.0  # times the distance of the quartiles: Tukey's "far out"


class Conditioning(nn.Module):
    """Maps [B, C, H, W] -> maps of the same shape, float32 (float64 for float64), without gradient.

    Args:
        channels: channels C of the maps.
    """

    measured: ClassVar[bool] = False  # whether it needs statistics

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    @torch.no_grad()
    def forward(self, maps: Tensor) -> Tensor:
        with without_autocast(maps.device):
            return self.condition(maps.to(compute_dtype(maps)))

    def condition(self, maps: Tensor) -> Tensor:
        """The conditioned maps."""
        raise NotImplementedError


class Layer(Conditioning):
    """Each cell with mean 0 and variance 1 over its channels, as a LayerNorm without parameters."""

    def condition(self, maps: Tensor) -> Tensor:
        return F.layer_norm(maps.movedim(1, -1), (self.channels,), eps=EPS).movedim(-1, 1)


class UnitLength(Conditioning):
    """Each cell divided by its length over the channels."""

    def condition(self, maps: Tensor) -> Tensor:
        return F.normalize(maps, dim=1, eps=EPS)


class Measured(Conditioning):
    """A conditioning with statistics: sums over all cells, which add up over batches and processes.

    Subclasses register what they compute from the sums as buffers, so that checkpoints hold it.
    """

    measured = True
    ready: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("ready", torch.tensor(False))
        self._is_ready = False  # on the host: a step must not wait for the device

    def forward(self, maps: Tensor) -> Tensor:
        if not self._is_ready:
            raise InputError(
                f"conditioning: {type(self).__name__} has no statistics yet; train, or load a checkpoint with them"
            )
        conditioned: Tensor = super().forward(maps)
        return conditioned

    @property
    def is_ready(self) -> bool:
        """Whether the statistics were measured or loaded."""
        return self._is_ready

    @torch.no_grad()
    def sums(self, maps: Tensor) -> Tensor:
        """What is added up of maps [B, C, H, W], a float64 vector."""
        return self.of_cells(maps.double().movedim(1, -1).flatten(0, -2))

    @torch.no_grad()
    def settle(self, sums: Tensor) -> None:
        """Computes the statistics from sums over all batches; they do not change afterwards."""
        for name, value in self.statistics(sums.cpu()).items():
            buffer = self.get_buffer(name)
            buffer.copy_(value.to(buffer.dtype))
        self.ready.fill_(True)
        self._is_ready = True

    def of_cells(self, cells: Tensor) -> Tensor:
        """What is added up of cells [N, C] in float64."""
        raise NotImplementedError

    def statistics(self, sums: Tensor) -> dict[str, Tensor]:
        """The buffers, from the sums."""
        raise NotImplementedError

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._is_ready = bool(self.ready)


class Channel(Measured):
    """Each channel with mean 0 and variance 1 over the data; nearly dead channels are not blown up."""

    mean: Tensor
    scale: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("scale", torch.ones(channels, 1, 1))

    def condition(self, maps: Tensor) -> Tensor:
        return (maps - self.mean.to(maps.dtype)) * self.scale.to(maps.dtype)

    def of_cells(self, cells: Tensor) -> Tensor:
        return torch.cat([cells.new_full((1,), len(cells)), cells.sum(0), cells.square().sum(0)])

    def statistics(self, sums: Tensor) -> dict[str, Tensor]:
        mean, square = sums[1:].view(2, -1, 1, 1) / sums[0].clamp_min(1)
        return self.from_moments(mean, square)

    def from_moments(self, mean: Tensor, square: Tensor) -> dict[str, Tensor]:
        """The buffers from the mean and the mean square of each channel, [C, 1, 1]."""
        variance = (square - mean.square()).clamp_min(0)
        return {"mean": mean, "scale": variance.clamp_min(DEAD * variance.median() + EPS**2).rsqrt()}


class Global(Channel):
    """All values with one mean and one standard deviation, those over all channels and the data."""

    def from_moments(self, mean: Tensor, square: Tensor) -> dict[str, Tensor]:
        centre = mean.mean()
        scale = (square.mean() - centre.square()).clamp_min(EPS**2).rsqrt()
        return {"mean": centre.expand_as(mean), "scale": scale.expand_as(mean)}


class PhiS(Measured):
    """PCA-Hadamard isotropic standardisation (PHI-S, Ranzinger et al. 2024, arXiv 2410.01680).

    `R U^T (x - mean) / phi`, with U the principal components of the channels, phi^2 the mean variance, and R the
    rotation by a Hadamard matrix: every new channel has variance 1, and distances are kept up to the factor 1 / phi.
    Where no Hadamard matrix is known for C channels, R is another rotation that makes all variances equal.
    """

    matrix: Tensor
    bias: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("matrix", torch.eye(channels))
        self.register_buffer("bias", torch.zeros(channels))

    def condition(self, maps: Tensor) -> Tensor:
        rotated = self.matrix.to(maps.dtype) @ maps.flatten(2)
        return (rotated + self.bias.to(maps.dtype)[:, None]).view_as(maps)

    def of_cells(self, cells: Tensor) -> Tensor:
        return torch.cat([cells.new_full((1,), len(cells)), cells.sum(0), (cells.mT @ cells).flatten()])

    def statistics(self, sums: Tensor) -> dict[str, Tensor]:
        count, (mean, second) = sums[0].clamp_min(1), sums[1:].split([self.channels, self.channels**2])
        mean = mean / count
        variances, components = torch.linalg.eigh(second.view(self.channels, -1) / count - torch.outer(mean, mean))
        variances = variances.clamp_min(0)
        known = hadamard(self.channels)
        rotation = equalising(variances) if known is None else known.to(mean) / self.channels**0.5
        matrix = rotation @ components.mT / variances.mean().clamp_min(EPS**2).sqrt()
        return {"matrix": matrix, "bias": -matrix @ mean}


class Clip(Measured):
    """Cells that are far longer than the others, the outlier tokens of ViTs, cut to the length where those begin.

    The limit is Tukey's outer fence of the logarithms of the lengths: third quartile plus 3 times the distance of the
    quartiles. All other cells stay as they are.
    """

    limit: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("limit", torch.zeros(()))

    def condition(self, maps: Tensor) -> Tensor:
        lengths = torch.linalg.vector_norm(maps, dim=1, keepdim=True)
        share: Tensor = self.limit.to(maps.dtype) / lengths.clamp_min(EPS)
        return maps * share.clamp_max(1)

    def of_cells(self, cells: Tensor) -> Tensor:
        octaves = torch.linalg.vector_norm(cells, dim=1).log2().clamp(-OCTAVES / 2, OCTAVES / 2 - 1e-6)
        bins = ((octaves + OCTAVES / 2) * (BINS / OCTAVES)).long()
        return torch.zeros(BINS, dtype=cells.dtype, device=cells.device).index_add_(0, bins, torch.ones_like(octaves))

    def statistics(self, sums: Tensor) -> dict[str, Tensor]:
        reached = sums.cumsum(0) / sums.sum().clamp_min(1)
        # upper ends of the bins: lengths that are all equal stay as they are
        first, third = (
            (torch.searchsorted(reached, sums.new_tensor([part])) + 1) * (OCTAVES / BINS) - OCTAVES / 2
            for part in (0.25, 0.75)
        )
        return {"limit": (third + FENCE * (third - first)).exp2()[0]}


CONDITIONINGS: dict[str, type[Conditioning]] = {
    "layer": Layer,
    "l2": UnitLength,
    "channel": Channel,
    "global": Global,
    "phi_s": PhiS,
    "clip": Clip,
}


def hadamard(size: int) -> Tensor | None:
    """A matrix of 1 and -1 with orthogonal rows, [size, size]: doublings of Paley's; None where that gives none."""
    inner = size
    while inner > 1 and not (inner % 4 == 0 and _is_prime(inner - 1)):
        if inner % 2:
            return None
        inner //= 2
    made = _paley(inner - 1) if inner > 1 else torch.ones(1, 1, dtype=torch.float64)
    while len(made) < size:  # Sylvester
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return made


def _paley(prime: int) -> Tensor:
    """Paley's first construction, for primes that leave 3 when divided by 4: [prime + 1, prime + 1]."""
    places = torch.arange(prime)
    residues = torch.full((prime,), -1.0, dtype=torch.float64)
    residues[places.square() % prime] = 1.0
    residues[0] = 0.0
    skew = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0] = 1.0, -1.0
    skew[1:, 1:] = residues[(places[:, None] - places) % prime]
    skew.diagonal().add_(1)
    return skew


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def equalising(variances: Tensor) -> Tensor:
    """A rotation R [C, C] with `diag(R diag(variances) R^T)` constant (Bendel & Mickey 1978).

    Each step rotates the least and the largest variance that are left, so that the first becomes the mean.
    """
    left, mean = variances.clone(), variances.mean()
    rotation = torch.diag(torch.ones_like(left))
    open_ = torch.ones_like(left, dtype=torch.bool)
    for _ in range(len(left) - 1):
        low = int(left.masked_fill(~open_, torch.inf).argmin())
        high = int(left.masked_fill(~open_, -torch.inf).argmax())
        if left[high] - left[low] <= 1e-12 * mean:
            break
        cos = ((left[high] - mean) / (left[high] - left[low])).sqrt()
        sin = (1 - cos.square()).clamp_min(0).sqrt()
        first, second = rotation[low].clone(), rotation[high].clone()
        rotation[low], rotation[high] = cos * first - sin * second, sin * first + cos * second
        left[high] += left[low] - mean
        open_[low] = False
    return rotation
