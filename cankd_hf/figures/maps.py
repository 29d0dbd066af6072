"""The numbers that figures show of feature maps; no drawing."""

import torch
import torch.nn.functional as F
from torch import Tensor


def activation(feature_map: Tensor) -> Tensor:
    """Mean over channels of the absolute value of a map [C, h, w], scaled to 0..1 (its 2nd to 98th percentile).

    Returns [h, w], 0 everywhere for a constant map: where a map is active and not how strongly, since two networks
    have no common scale.
    """
    strength = feature_map.abs().mean(dim=0)
    low, high = _percentiles(strength.flatten(), 0.02, 0.98)
    return ((strength - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)


def instance_normalised(feature_map: Tensor) -> Tensor:
    """Each channel of [C, h, w] with mean 0 and variance 1 over positions, as CanKD compares maps."""
    if feature_map[0].numel() == 1:
        return torch.zeros_like(feature_map)
    return F.instance_norm(feature_map[None])[0]


def difference(student: Tensor, teacher: Tensor) -> Tensor:
    """Half the squared difference of the instance-normalised maps, mean over channels, at each position.

    The mean of the result [h, w] is the distance of the CanKD loss (instance-norm MSE) between the teacher map
    [C, h, w] and the student map [C, h, w], before or after the Can block. 0: equal; 1 on average: unrelated maps.
    """
    gap = instance_normalised(student) - instance_normalised(teacher)
    return 0.5 * gap.square().mean(dim=0)


def pca_colours(reference: Tensor, *others: Tensor) -> list[Tensor]:
    """The first three principal components of a map as red, green and blue, and other maps in the same basis.

    Maps are instance-normalised first, because the loss leaves scale and mean of each channel free. Each component is
    scaled to 0..1 by the reference's 2nd to 98th percentile and clipped. The sign of a component, which is arbitrary,
    is chosen so that its largest weight is positive.

    Args:
        reference: [C, h, w], from which basis and scale are computed.
        others: [C, *, *].

    Returns:
        [h, w, 3] in 0..1 for the reference and each of the others.
    """
    flat = instance_normalised(reference).flatten(1)
    if flat.shape[0] <= flat.shape[1]:
        basis = torch.linalg.eigh((flat @ flat.T).double()).eigenvectors.flip(1)[:, :3].float()
    else:
        basis = torch.linalg.svd(flat, full_matrices=False).U[:, :3]
    basis = basis * basis.gather(0, basis.abs().argmax(dim=0, keepdim=True)).sign()
    low, high = _percentiles(flat.T @ basis, 0.02, 0.98)
    coloured = []
    for feature_map in (reference, *others):
        scores = instance_normalised(feature_map).flatten(1).T @ basis
        scores = ((scores - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
        colours = F.pad(scores, (0, 3 - scores.shape[1]), value=0.5)  # maps of one or two channels
        coloured.append(colours.view(*feature_map.shape[1:], 3))
    return coloured


def effective_keys(weights: Tensor) -> float:
    """Effective number of keys of a softmax: exp of its entropy, from 1 (one key) to M (uniform)."""
    share = weights.double().flatten()
    return float(torch.exp(-torch.xlogy(share, share).sum()))


def _percentiles(values: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Along the first dimension. By sorting: torch.quantile refuses large maps."""
    ordered = values.sort(dim=0).values
    last = len(ordered) - 1
    return ordered[round(low * last)], ordered[round(high * last)]
