"""A teacher's surest detections as labels of images that have none, for the student's own loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cankd_hf.losses.base import DistillationLoss, at_most_one

BINS = 1000  # of the histograms of scores
SMALLEST = 1e-3  # side of a box, as a fraction of the picture's
TOLD = 20  # classes at most that the log tells of one by one
RARE = 0.1  # a class whose part of the chosen boxes is below this part of its prior is told
Found = Mapping[str, Tensor]  # scores [B, M], labels [B, M], boxes [B, M, 4] as corners in 0..1
PseudoLabels = dict[str, Tensor]  # class_labels [n], boxes [n, 4] (centre, size), uncertain [m, 4] (corners)


class Chosen(NamedTuple):
    """What is chosen for a batch."""

    labels: list[PseudoLabels | None]  # of each image; None for those that have their own or get none
    factor: Tensor  # of the loss []
    part: Tensor  # [], of this process in the images with such labels, times the number of processes


class PseudoBoxesLoss(DistillationLoss):
    """The student's own loss on unlabelled images, with the surest detections of the teacher as their labels.

    For any pair of detectors with the same classes, also where no logits can be compared. Of each class as many boxes
    are labels as `share` of the objects that the unlabelled images are expected to hold by the labelled ones, the
    best first (Chen et al. 2022, LabelMatch: thresholds by class, of which the top 20% are reliable).
    Other detections down to the score `floor` are uncertain: what the student predicts there has no part in the loss.
    Images without any sure box have none either. The thresholds are those of all images so far, of all processes.

    The value is the student's loss on these images, times `chosen / expected` boxes where fewer are chosen than
    expected, so that few labels do not weigh as much as many.

    Args:
        num_labels: classes K of both detectors.
        share: the part of the expected objects of a class that become labels, above 0 and at most 1.
        floor: the lowest score of an uncertain detection; no label has a lower one.
    """

    reads = "boxes"
    paper = "2206.06608"
    citation = (
        "@inproceedings{chen2022labelmatch, title={Label Matching Semi-Supervised Object Detection}, author={Chen, "
        "Binbin and Chen, Weijie and Yang, Shicai and Xuan, Yunyi and Song, Jie and Xie, Di and Pu, Shiliang and "
        "Song, Mingli and Zhuang, Yueting}, booktitle={CVPR}, year={2022}}"
    )
    _argument, _unit, _layouts = "num_labels", "classes", {}

    counts: Tensor
    objects: Tensor
    images: Tensor
    chosen: Tensor

    def __init__(self, num_labels: int, share: float = 0.2, floor: float = 0.05) -> None:
        super().__init__(num_labels)
        at_most_one("PseudoBoxesLoss", share=share, floor=floor)
        self.share, self.floor = share, floor
        self.register_buffer("counts", torch.zeros(num_labels, BINS))  # teacher's detections by class and score
        self.register_buffer("objects", torch.zeros(num_labels))  # labelled objects by class
        self.register_buffer("images", torch.zeros(2))  # with labels, and without
        self.register_buffer("chosen", torch.zeros(num_labels))  # boxes that were labels, by class

    def forward(self, student: Tensor, teacher: Tensor, **extras: Any) -> Tensor:
        """Raises `TypeError`: see `choose`; the value is the student's own loss."""
        raise TypeError("PseudoBoxesLoss: compares no tensors; its value is the student's loss on what it chooses")

    @torch.no_grad()
    def choose(self, found: Found, labels: Sequence[Mapping[str, Tensor] | None]) -> Chosen:
        """Labels for the images that have none.

        Args:
            found: the teacher's detections in all images.
            labels: of the images; None for those without.
        """
        bare = [row for row, label in enumerate(labels) if label is None]
        bins = (found["scores"].float() * BINS).long().clamp(0, BINS - 1)
        big = (found["boxes"][..., 2:] - found["boxes"][..., :2] > SMALLEST).all(-1)
        usable = big & (bins >= self.floor * BINS)
        if self.training:
            self._observe(bins, found["labels"], usable, labels, bare)
        least = self.thresholds()
        sure = usable & (bins >= least[found["labels"].clamp(0, self.size - 1)])
        made: list[PseudoLabels | None] = [None] * len(labels)
        chosen = self.chosen.new_zeros(self.size)
        for row in bare:
            mine = sure[row]
            boxes, classes = found["boxes"][row].float(), found["labels"][row]
            if not mine.any():  # waits for the device, as the losses of detectors do
                continue
            chosen += classes[mine].bincount(minlength=self.size)
            made[row] = {
                "class_labels": classes[mine],
                "boxes": torch.cat([boxes[mine].unflatten(1, (2, 2)).mean(1), boxes[mine, 2:] - boxes[mine, :2]], 1),
                "uncertain": boxes[usable[row] & ~mine],
            }
        rows = chosen.new_tensor([sum(one is not None for one in made), 1.0])
        every = _over_processes(torch.cat([chosen, self.expected(len(bare)).sum()[None], rows]))
        got, wanted, images, processes = every[: self.size], every[self.size], *every[-2:]
        if self.training:
            self.chosen += got
        factor = (got.sum() / wanted.clamp_min(1e-6)).clamp(max=1)
        return Chosen(made, factor, rows[0] * processes / images.clamp_min(1))

    def expected(self, images: int | Tensor) -> Tensor:
        """The number of labels of each class [K] that so many unlabelled images should get."""
        return self.share * images * self.objects / self.images[0].clamp_min(1)

    def thresholds(self) -> Tensor:
        """The lowest bin of scores [K] of which all detections so far are no more than expected."""
        above = self.counts.flip(1).cumsum(1).flip(1)  # detections in this bin and all higher ones
        return (above > self.expected(self.images[1])[:, None]).sum(1)

    def rare_classes(self) -> list[int]:
        """Classes that nearly vanish among the labels: below a tenth of their part of the labelled objects."""
        wanted = self.objects / self.objects.sum().clamp_min(1)
        got = self.chosen / self.chosen.sum().clamp_min(1)
        told = (got < RARE * wanted) & (self.expected(self.images[1]) >= 5)
        return [int(index) for index in told.nonzero()[:, 0]]

    def report(self, *given: Any, **extras: Any) -> dict[str, Tensor]:
        """Of all images so far: `boxes_an_image`, labels for each without; the lowest and the highest threshold; and
        `kept/0`, `kept/1`, ...: labels of a class for each that was asked for; of up to 20 classes."""
        least = self.thresholds() / BINS
        told = {
            "boxes_an_image": self.chosen.sum() / self.images[1].clamp_min(1),
            "lowest_threshold": least.amin(),
            "highest_threshold": least.amax(),
        }
        kept = self.chosen / self.expected(self.images[1])  # NaN where none is asked for, which logs leave out
        return told | ({f"kept/{index}": value for index, value in enumerate(kept)} if self.size <= TOLD else {})

    def _observe(
        self,
        bins: Tensor,
        classes: Tensor,
        usable: Tensor,
        labels: Sequence[Mapping[str, Tensor] | None],
        bare: Sequence[int],
    ) -> None:
        """Counts the detections in images without labels, and the objects of the others, of all processes."""
        seen = torch.zeros(self.size * BINS + self.size + 2, device=bins.device)
        for row in bare:
            places = classes[row].clamp(0, self.size - 1) * BINS + bins[row]
            seen.index_add_(0, places, usable[row].to(seen.dtype))
        known = [label for label in labels if label is not None]
        for label in known:
            ones = seen.new_ones(len(label["class_labels"]))
            seen.index_add_(0, self.size * BINS + label["class_labels"].clamp(0, self.size - 1), ones)
        seen[-2:] = seen.new_tensor([len(known), len(bare)])
        counts, objects, images = _over_processes(seen).split([self.size * BINS, self.size, 2])
        self.counts += counts.view_as(self.counts)
        self.objects += objects
        self.images += images


def _over_processes(value: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value)
    return value
