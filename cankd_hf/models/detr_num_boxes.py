"""A mistake of transformers 5.23 in the losses of the DETR family, mended."""

from __future__ import annotations

from functools import partial

from transformers.loss import loss_for_object_detection as losses


def patch_detr_num_boxes() -> None:
    """Lets the losses of DETR and its kin divide by the mean number of boxes of all processes, as they say they do.

    They divide what accelerate's `reduce` gives by the number of processes; but that is the mean already, so with N
    processes the loss was N times too large beside the feature losses. Summing instead makes both right. The test of
    two processes notices when transformers changes this.
    """
    if not isinstance(losses.reduce, partial):
        losses.reduce = partial(losses.reduce, reduction="sum")  # type: ignore[assignment]
