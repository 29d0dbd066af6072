"""A fix for the losses of the DETR family in transformers 5.23 with several processes."""

from functools import partial

from transformers.loss import loss_for_object_detection as losses


def patch_detr_num_boxes() -> None:
    """Makes the losses of the DETR family divide by the mean number of boxes of all processes, as intended.

    They divide the result of accelerate's `reduce` by the number of processes; but that is the mean already, so with N
    processes the loss was N times too large relative to the feature losses. Summing instead corrects both. The test of
    two processes notices when transformers changes this.
    """
    if not isinstance(losses.reduce, partial):
        losses.reduce = partial(losses.reduce, reduction="sum")  # type: ignore[assignment]
