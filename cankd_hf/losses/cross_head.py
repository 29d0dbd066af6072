"""A dense detector's predictions from the student's features in the teacher's head."""

from typing import Literal

from torch import Tensor, nn

from cankd_hf.errors import InputError
from cankd_hf.losses.base import Seen, run_in_type
from cankd_hf.losses.dense_logits import DenseLogitsLoss, Predictions

TOWERS = ("classes", "boxes")  # the two branches of a dense detector's head


class CrossHeadLoss(DenseLogitsLoss):
    """`dense_logits` of what the teacher's head makes of the student's features (CrossKD, Wang et al. 2024).

    The student's head runs up to layer `layer` of its two towers; the rest of the teacher's frozen head, from the next
    layer on, predicts from there. What it says is compared with the teacher's own predictions at the teacher's
    anchors, so the heads of the two may be of different kinds. The student's own predictions are left to the labels.
    Where the widths differ, a 1x1 convolution for each tower lies between. The authors also shift the student's
    features to the statistics of the teacher's; this does not, so that a stored teacher will do.

    Args:
        num_labels: classes K of the teacher's head.
        layer: after how many layers of the towers the features are taken; 0 takes the maps at the student's taps,
            for students with other heads. By default all layers of the teacher's towers but one (3 of 4, as in the
            paper's configurations), or as many as the student's have; 0 if they have none.
        gamma: exponent of the difference that class logits are weighted by; 0 weighs all alike.
        boxes: weight of the boxes and the centre-ness.
        region: fraction of the anchors whose boxes are compared.
        outside: the target of the classes outside of the region, see `dense_logits`.
        channels: widths of the student's and of the teacher's features; filled in by the distiller.

    Shape:
        As `dense_logits`, for the predictions of the teacher's head.
    """

    crosses = True
    paper = "2306.11369"
    citation = (
        "@inproceedings{wang2024crosskd, title={CrossKD: Cross-Head Knowledge Distillation for Object Detection}, "
        "author={Wang, Jiabao and Chen, Yuming and Zheng, Zhaohui and Li, Xiang and Cheng, Ming-Ming and Hou, "
        "Qibin}, booktitle={CVPR}, year={2024}}"
    )

    def __init__(
        self,
        num_labels: int,
        layer: int | None = None,
        gamma: float = 1.0,
        boxes: float = 1.0,
        region: float = 0.01,
        outside: Literal["teacher", "zero"] = "teacher",
        channels: tuple[int, int] = (1, 1),
    ) -> None:
        super().__init__(num_labels, gamma, boxes, region, outside)
        if layer is not None and (not isinstance(layer, int) or layer < 0):
            raise InputError(f"CrossHeadLoss.layer: expected at least 0, got {layer!r}; leave it out for all but one")
        self.layer = layer
        ours, theirs = channels
        self.adapters = nn.ModuleDict({name: nn.Conv2d(ours, theirs, 1) for name in TOWERS if ours != theirs})

    def compute(
        self,
        student: Tensor,
        teacher: Tensor,
        predictions: tuple[Predictions, Predictions] | None = None,
        weights: Seen | None = None,
    ) -> Tensor:
        """As `dense_logits`; all parameters have a gradient, if of 0, whatever is compared: DDP waits for each."""
        value = super().compute(student, teacher, predictions, weights)
        return value + sum(0.0 * parameter.sum() for parameter in self.parameters())

    def adapted(self, tower: str, feature: Tensor) -> Tensor:
        """A feature of the student [B, C_s, H, W] with the channels of the teacher's head."""
        return run_in_type(self.adapters[tower], feature) if tower in self.adapters else feature
