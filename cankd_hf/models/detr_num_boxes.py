"""A fix for the losses of the DETR family and of Mask2Former's in transformers 5.24 with several processes."""

import sys
from functools import partial
from typing import Any

from transformers import PreTrainedModel
from transformers.loss import loss_for_object_detection as losses


def patch_detr_num_boxes() -> None:
    """Makes the losses of the DETR family divide by the mean number of boxes of all processes, as intended.

    They divide the result of accelerate's `reduce` by the number of processes; but that is the mean already, so with N
    processes the loss was N times too large relative to the feature losses. Summing instead corrects both. The test of
    two processes notices when transformers changes this.
    """
    _add_up(losses)


def patch_num_masks(model: PreTrainedModel) -> None:
    """The same for the number of masks in the losses of Mask2Former, MaskFormer and EoMT, in their own files."""
    for cls in type(model).__mro__:
        _add_up(sys.modules[cls.__module__])


def _add_up(module: Any) -> None:
    reduce: Any = getattr(module, "reduce", None)
    if getattr(reduce, "__module__", "").startswith("accelerate."):  # not changed before
        module.reduce = partial(reduce, reduction="sum")
