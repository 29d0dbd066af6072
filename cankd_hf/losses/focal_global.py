"""Foreground, background and the relations between cells, each with its weight (FGD)."""

import logging
from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from cankd_hf.losses.base import FeatureLoss, above_zero, at_least_zero, run_in_type

logger = logging.getLogger(__name__)
AT_ONCE = 16  # boxes of each image whose masks are in memory


class FocalGlobalLoss(FeatureLoss):
    """Focal and global knowledge distillation for detectors (FGD, Yang et al. 2022, sections 3.1 and 3.2).

    The sum, averaged over B, of

    - `alpha * sum F A_S A_C (s - t)^2 + beta * sum G A_S A_C (s - t)^2`: in F a cell of a labelled box weighs 1 /
      (cells of the smallest box it lies in), in G each other cell 1 / (number of them); `A_S = H W softmax(mean_c |t|
      / T)` over cells and `A_C = C softmax(mean_hw |t| / T)` over channels are the teacher's attention;
    - `gamma * (|A_S(s) - A_S(t)|_1 + |A_C(s) - A_C(t)|_1)`;
    - `lambda * sum (R(s) - R(t))^2` with a global context block for each side, `R(x) = x + W2 relu(LN(W1 sum_j
      softmax_j(w x) x_j))`, trained with the student.

    The factors are those published for one-stage detectors, so weight 1 is the paper's. Boxes are read from the
    `boxes` of a detector's labels, in 0..1 of the map. **Without boxes (other tasks, images without labels) this is a
    variant of ours, not the paper's**: all cells are one region of the foreground; a warning says so once.

    Args:
        channels: channels C of both maps.
        temperature: T of the attentions.
        alpha: factor of the foreground.
        beta: factor of the background.
        gamma: factor of the attentions.
        relation: factor of the relations, the paper's lambda.

    Shape:
        student and teacher [B, C, H, W] -> []; labels: for each image `boxes` [n, 4], centre, width and height.
    """

    extras = ("labels",)
    paper = "2111.11837"
    citation = (
        "@inproceedings{yang2022fgd, title={Focal and Global Knowledge Distillation for Detectors}, author={Yang, "
        "Zhendong and Li, Zhe and Jiang, Xiaohu and Gong, Yuan and Yuan, Zehuan and Zhao, Danpei and Yuan, Chun}, "
        "booktitle={CVPR}, year={2022}}"
    )

    def __init__(
        self,
        channels: int,
        temperature: float = 0.5,
        alpha: float = 1e-3,
        beta: float = 5e-4,
        gamma: float = 1e-3,
        relation: float = 5e-6,
    ) -> None:
        super().__init__(channels)
        above_zero("FocalGlobalLoss", temperature=temperature)
        at_least_zero("FocalGlobalLoss", alpha=alpha, beta=beta, gamma=gamma, relation=relation)
        self.temperature, self.alpha, self.beta, self.gamma, self.relation = temperature, alpha, beta, gamma, relation
        self.context_s, self.context_t = GlobalContext(channels), GlobalContext(channels)

    def compute(self, student: Tensor, teacher: Tensor, labels: object = None) -> Tensor:
        """The loss [] of two checked maps [B, C, H, W], and the labels of the batch."""
        boxes = boxes_of(labels)
        if boxes is None and not torch.compiler.is_compiling():
            _warn_without_boxes()
        weights = self.alpha / student[0, 0].numel() if boxes is None else self._weights(boxes, student)
        s, t = student.flatten(2), teacher.flatten(2)
        (cells_s, channels_s), (cells_t, channels_t) = self._attention(s), self._attention(t)
        difference = s - t
        squares = difference.square()
        # sums over the channels, weighted and not, in one pass
        attended, plain = (torch.stack([channels_t, torch.ones_like(channels_t)], 1) @ squares).unbind(1)
        focal = (attended * cells_t * weights).sum()
        attention = (cells_s - cells_t).abs().sum() + (channels_s - channels_t).abs().sum()
        # R(s) - R(t) adds one number to each channel of the difference: its square from two sums over the cells
        added = run_in_type(self.context_s, s) - run_in_type(self.context_t, t)
        moved = (2 * difference.sum(-1) + s.shape[2] * added) * added
        relation = plain.sum() + moved.sum()
        return (focal + self.gamma * attention + self.relation * relation) / len(s)

    def _attention(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of a map [B, C, N] over cells [B, N] and over channels [B, C]; either has a mean of 1."""
        size, (_, channels, cells) = x.abs(), x.shape
        return (
            cells * (size.mean(1) / self.temperature).softmax(-1),
            channels * (size.mean(2) / self.temperature).softmax(-1),
        )

    def _weights(self, boxes: Sequence[Tensor | None], x: Tensor) -> Tensor:
        """`alpha F + beta G` of each cell, [B, H * W]; all cells of an image without labels are one foreground."""
        given = [x.new_zeros(0, 4) if one is None else one for one in boxes]
        foreground = foreground_mask(given, x.shape[2], x.shape[3], x.dtype)
        background = (foreground == 0).to(x.dtype)
        background = background / background.sum(1, keepdim=True).clamp_min(1)
        weights = self.alpha * foreground + self.beta * background
        if all(one is not None for one in boxes):
            return weights
        whole = weights.new_full((weights.shape[1],), self.alpha / weights.shape[1])
        return torch.stack([whole if one is None else row for one, row in zip(boxes, weights, strict=True)])


class GlobalContext(nn.Module):
    """What a global context block adds to every cell: a map [B, C, N] -> [B, C], 0 at the start."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 2, 1)
        self.score = nn.Linear(channels, 1, bias=False)  # a bias would not change the softmax
        self.transform = nn.Sequential(
            nn.Linear(channels, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, channels)
        )
        nn.init.kaiming_normal_(self.score.weight)
        for parameter in self.transform[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.score.weight @ x).softmax(-1)  # [B, 1, N]
        result: Tensor = self.transform((x @ weights.mT)[..., 0])
        return result


def boxes_of(labels: object) -> list[Tensor | None] | None:
    """The boxes [n, 4] of each image (centre, width, height in 0..1), None for one without labels; None for labels of
    another kind, and where there are none."""
    if not isinstance(labels, Sequence) or all(one is None for one in labels):
        return None
    if not all(one is None or (isinstance(one, Mapping) and "boxes" in one) for one in labels):
        return None
    return [None if one is None else one["boxes"].reshape(-1, 4).float() for one in labels]


def foreground_mask(boxes: Sequence[Tensor], height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """F of each cell [B, height * width]: 1 / (cells of the smallest box over it), 0 outside of all boxes.

    A box takes the cells from floor to ceil of its corners, both included, as in the authors' code (whose mask swaps
    rows and columns).
    """
    padded = pad_sequence(list(boxes), batch_first=True, padding_value=-1.0)  # [B, n, 4]: -1 lies outside
    x, y, w, h = padded[..., None].unbind(2)  # [B, n, 1] each
    left, right = ((x - w / 2) * width).floor(), ((x + w / 2) * width).ceil()
    top, bottom = ((y - h / 2) * height).floor(), ((y + h / 2) * height).ceil()
    share = 1 / ((right - left + 1) * (bottom - top + 1)).to(dtype)
    columns, rows = (torch.arange(n, device=padded.device) for n in (width, height))
    across, down = (columns >= left) & (columns <= right), (rows >= top) & (rows <= bottom)  # [B, n, width or height]
    mask = share.new_zeros(len(padded), height, width)
    for start in range(0, padded.shape[1], AT_ONCE):
        some = slice(start, start + AT_ONCE)
        inside = down[:, some, :, None] & across[:, some, None, :]  # [B, n, height, width]
        mask = torch.maximum(mask, torch.where(inside, share[:, some, :, None], 0).amax(1))
    return mask.flatten(1)


@cache
def _warn_without_boxes() -> None:
    logger.warning(
        "focal_global: no boxes in the labels: all cells count as foreground, which is not the paper's loss"
    )
