"""Scores of predicted depth from sums of each image: exact for any number of processes, without keeping depth maps."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

# What is summed over the pixels of an image that have a depth; `d` is the true depth, `p` the predicted one.
SUMS = ("pixels", "abs_rel", "sq_rel", "squared", "squared_log", "log10", "delta1", "delta2", "delta3")
LEAST = 1e-3  # metres: smaller predictions count as this
THRESHOLD = 1.25  # of max(p / d, d / p), to the power of 1, 2 and 3


@torch.no_grad()
def depth_sums(
    predicted: Tensor,
    depth: Tensor,
    relative: bool = False,
    limit: float | None = None,
    label_sizes: Tensor | np.ndarray | None = None,
) -> Tensor:
    """Sums over the pixels of each image from which all scores follow.

    Args:
        predicted: [B, h, w], metres, or inverse depth up to scale and shift; resized to the size of the depth maps.
        depth: [B, H, W] in metres; pixels that are 0 or not finite do not count.
        relative: whether predictions are relative: each is first aligned to its truth, see `aligned`.
        limit: metres, above which predictions count as this; None: no limit.
        label_sizes: [B, 2], height and width of each depth map in `depth`, where these are padded; None: they are not.

    Returns:
        float64 [B, 9], the `SUMS`, on the device of `predicted` (float32 where that has no float64).
    """
    sizes = [list(depth.shape[-2:])] * len(depth) if label_sizes is None else label_sizes.tolist()
    rows = []
    for values, truth, (height, width) in zip(predicted, depth, sizes, strict=True):
        truth = wide(truth[:height, :width])
        values = resized(values, (height, width))
        known = (truth > 0) & torch.isfinite(truth)
        metres = aligned(values, truth, known, limit) if relative else values
        rows.append(_sums(metres.clamp(LEAST, limit), truth, known))
    return torch.stack(rows)


def resized(values: Tensor, size: tuple[int, int]) -> Tensor:
    """A predicted map [h, w], bilinear, at another size, in float64."""
    if tuple(values.shape) != tuple(size):
        values = interpolate(values.float()[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    return wide(values)


def wide(values: Tensor) -> Tensor:
    """Numbers in float64, float32 on a device that has none."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)


def aligned(inverse: Tensor, truth: Tensor, known: Tensor, limit: float | None) -> Tensor:
    """Metres [H, W] from predicted inverse depth, whose scale and shift fit the true one best, by least squares.

    As MiDaS is evaluated (Ranftl et al. 2020, section 5): fitted to `1 / truth` over the known pixels, cut off at the
    inverse of `limit` (of the farthest true depth where there is none), and inverted. A constant prediction becomes
    the mean.
    """
    target = (1 / truth.where(known, 1)).where(known, 0)
    count = known.sum().clamp(min=1)
    mean_p, mean_t = inverse.where(known, 0).sum() / count, target.sum() / count
    apart = (inverse - mean_p).where(known, 0)
    spread = (apart**2).sum()
    flat = spread <= 1e-18 * count * mean_p**2
    scale = ((apart * (target - mean_t)).sum() / spread.where(~flat, 1)).where(~flat, 0)
    farthest = truth.where(known, 0).amax() if limit is None else truth.new_tensor(limit)
    return 1 / (scale * (inverse - mean_p) + mean_t).clamp(min=1 / farthest.clamp(min=LEAST))


def _sums(metres: Tensor, truth: Tensor, known: Tensor) -> Tensor:
    """The `SUMS` of one image."""
    safe = truth.where(known, 1)
    apart, logs = metres - safe, metres.log() - safe.log()
    ratio = torch.maximum(metres / safe, safe / metres)
    parts = [torch.ones_like(safe), apart.abs() / safe, apart**2 / safe, apart**2, logs**2, logs.abs() / np.log(10)]
    parts += [(ratio < THRESHOLD**power).to(safe.dtype) for power in (1, 2, 3)]
    return torch.stack([part.where(known, 0).sum() for part in parts])


def depth_scores(sums: Tensor | np.ndarray) -> dict[str, float]:
    """Scores of a whole set.

    Args:
        sums: [..., 9], from `depth_sums`.

    Returns:
        Over all pixels with a depth: `abs_rel`, mean of `|p - d| / d`; `rmse`, in metres; `delta1`, `delta2`,
        `delta3`, share of pixels where `max(p / d, d / p)` is below 1.25, its square and its cube; `sq_rel`,
        `rmse_log`, `log10`.
        And `image_abs_rel`, `image_rmse`, `image_delta1`: the mean over images of the score of each, as many papers
        report (Eigen et al. 2014, BTS). nan where there is no pixel.

    Raises:
        ValueError: for sums of another shape.
    """
    table = np.asarray(sums.detach().cpu() if isinstance(sums, Tensor) else sums, dtype=np.float64)
    if table.ndim < 1 or table.shape[-1] != len(SUMS):
        raise ValueError(f"expected sums [..., {len(SUMS)}], got {list(table.shape)}")
    table = table.reshape(-1, len(SUMS))
    table = table[table[:, 0] > 0]
    whole, images = _means(table.sum(0, keepdims=True)), _means(table)
    scores = {name: float(values.mean()) if len(table) else float("nan") for name, values in whole.items()}
    of_images = ("abs_rel", "rmse", "delta1")
    return scores | {f"image_{name}": float(images[name].mean()) if len(table) else float("nan") for name in of_images}


def image_abs_rel(sums: np.ndarray) -> np.ndarray:
    """The AbsRel of each image, [N]; nan for one without a depth."""
    table = np.asarray(sums, dtype=np.float64)
    return np.divide(table[:, 1], table[:, 0], out=np.full(len(table), np.nan), where=table[:, 0] > 0)


def _means(table: np.ndarray) -> dict[str, np.ndarray]:
    """The scores of rows of sums."""
    found = dict(zip(SUMS[1:], (table[:, 1:] / np.maximum(table[:, :1], 1)).T, strict=True))
    roots = {"rmse": np.sqrt(found.pop("squared")), "rmse_log": np.sqrt(found.pop("squared_log"))}
    order = ("abs_rel", "rmse", "delta1", "delta2", "delta3", "sq_rel", "rmse_log", "log10")
    return {name: {**found, **roots}[name] for name in order}
