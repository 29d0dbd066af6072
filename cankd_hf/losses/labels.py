"""Labels of positions on the grid of the logits that a loss compares."""

import torch.nn.functional as F
from torch import Tensor


def labels_of(labels: object, logits: Tensor) -> Tensor | None:
    """Labels for each image or position of logits, resized to their grid; None where they are of another kind."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim != logits.ndim - 1:
        return None
    if logits.ndim == 2:
        return labels
    if logits.ndim == 3 or labels.shape[1:] == logits.shape[2:]:
        return None if logits.ndim == 3 else labels
    resized = F.interpolate(labels[:, None].float(), size=logits.shape[2:], mode="nearest-exact")
    return resized[:, 0].long()
