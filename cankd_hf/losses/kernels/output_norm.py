"""The output norm of the Can block as a scale and a shift, from the moments of each image.

The normalised map is never built: a BatchNorm over [B, C, H, W] needs the mean and variance of each image and channel
only. Letters: B batch, C channels.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from cankd_hf.losses.base import compute_dtype


def batch_affine(
    norm: nn.BatchNorm2d | nn.SyncBatchNorm, mean: Tensor, var: Tensor, positions: int, update: bool
) -> tuple[Tensor, Tensor]:
    """What the norm does to a map, as `scale * map + shift`, [C] each.

    mean and (biased) var [B, C] are taken over the positions H * W of each image; a SyncBatchNorm takes those of all
    processes. With `update` the running statistics move in train mode.
    """
    if not norm.training and norm.running_mean is not None and norm.running_var is not None:
        batch_mean, batch_var = norm.running_mean.to(mean), norm.running_var.to(mean)
    else:
        batch_mean, batch_var, count = _batch_statistics(norm, mean, var, positions)
        if update and norm.training:
            _update_running(norm, batch_mean.detach(), batch_var.detach(), count)
    scale = norm.weight.to(mean) * (batch_var + norm.eps).rsqrt()
    return scale, norm.bias.to(mean) - scale * batch_mean


def whole_norm(norm: nn.BatchNorm2d | nn.SyncBatchNorm, x: Tensor) -> Tensor:
    """The norm of a map [B, C, H, W] in memory, with its running statistics updated in train mode."""
    wide = compute_dtype(x)
    if norm.weight.dtype == wide and not _is_synchronised(norm):
        result: Tensor = norm(x)
        return result
    # torch's own SyncBatchNorm waits for the device in every step, to find processes without an image
    var, mean = torch.var_mean(x.flatten(2).to(wide), -1, correction=0)
    scale, shift = batch_affine(norm, mean, var, x.shape[2] * x.shape[3], update=True)
    return (x * scale[:, None, None] + shift[:, None, None]).to(x.dtype)


def _batch_statistics(
    norm: nn.BatchNorm2d | nn.SyncBatchNorm, mean: Tensor, var: Tensor, positions: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance [C] over the batch, and the number of values []."""
    images = mean.new_full((), mean.shape[0])
    if not _is_synchronised(norm):
        batch_mean = mean.mean(0)
        return batch_mean, (var + (mean - batch_mean).square()).mean(0), images * positions
    # processes may hold different numbers of images and of positions, so everything is weighted by its count
    group = norm.process_group if norm.process_group is not None else dist.group.WORLD
    values = images * positions
    total = all_reduce(torch.cat([mean.sum(0) * positions, values[None]]), group=group)
    batch_mean, count = total[:-1] / total[-1], total[-1].detach()
    squares = (var + (mean - batch_mean).square()).sum(0) * positions
    return batch_mean, all_reduce(squares, group=group) / count, count


def _is_synchronised(norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> bool:
    return (
        isinstance(norm, nn.SyncBatchNorm)
        and norm.training
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size(norm.process_group) > 1
    )


@torch.no_grad()
def _update_running(norm: nn.BatchNorm2d | nn.SyncBatchNorm, mean: Tensor, var: Tensor, count: Tensor) -> None:
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    norm.num_batches_tracked += 1
    # momentum None means the plain average of all batches, in torch
    momentum = 1 / norm.num_batches_tracked.to(mean) if norm.momentum is None else norm.momentum
    unbiased = var * (count / (count - 1).clamp_min(1))
    for running, value in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        running += momentum * (value.to(running) - running)
