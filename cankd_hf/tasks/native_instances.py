"""What transformers has beside each of its families that segment instances: image processors, calls, outputs."""

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import (
    BaseImageProcessor,
    DetrImageProcessor,
    EomtImageProcessor,
    Mask2FormerImageProcessor,
    MaskFormerImageProcessor,
    PreTrainedModel,
    RfDetrImageProcessor,
)

from cankd_hf.models.native_masks import UNIVERSAL
from cankd_hf.tasks.export_forms import Agreement, ExportForm, PlainOutputs, QueriesForm

logger = logging.getLogger(__name__)

PROCESSORS: dict[str, type[BaseImageProcessor]] = {
    "mask2former": Mask2FormerImageProcessor,
    "maskformer": MaskFormerImageProcessor,
    **dict.fromkeys(("eomt", "eomt_dinov3"), EomtImageProcessor),
    "detr": DetrImageProcessor,
    "rf_detr": RfDetrImageProcessor,
}
# Further arguments of a call of the pipeline, which gives panoptic segments where nothing is asked for. Those of EoMT,
# whose other method does not take the pipeline's arguments, are instances where nothing was trained as stuff.
CALLS = {
    **dict.fromkeys(("mask2former", "maskformer", "detr"), ', subtask="instance", threshold=0.5'),
    **dict.fromkeys(("eomt", "eomt_dinov3"), ", threshold=0.5"),
    "rf_detr": ", threshold=0.5, mask_threshold=0.0",
}
# Outputs of an exported file.
OF_MASKS = {
    "class_queries_logits": "[B, N, K + 1] float32, the last one for no object",
    "masks_queries_logits": "[B, N, h, w] float32, of the whole input; resize to it, then above 0",
}
OF_BOXES = {
    "logits": "[B, N, K] float32, as the image processor of transformers reads them",
    "pred_boxes": "[B, N, 4] float32, centre x, centre y, width, height in 0..1 of the input",
    "pred_masks": "[B, N, h, w] float32, of the whole input; resize to it, then above 0",
}


def own_image_processor(
    model_type: str, settings: Mapping[str, Any], stretches: bool, fixed: tuple[int, int] | None
) -> BaseImageProcessor:
    """The image processor of a family.

    Args:
        model_type: one of `PROCESSORS`.
        settings: that all of them take.
        stretches: whether they make images of one size, whatever the aspect ratio.
        fixed: height and width of the only images that the model takes, if it is so.
    """
    further: dict[str, Any] = {}
    if fixed is not None:  # pads images to the longest edge, and reads no other form of the size
        further = {"size": {"shortest_edge": fixed[0], "longest_edge": fixed[1]}, "do_pad": True, "do_resize": True}
        if stretches:
            logger.warning(
                "%s: the image processor saved beside the student keeps the aspect ratio and pads images to %d x %d, "
                "here they are stretched; data.keep_aspect: true treats all alike",
                *(model_type, *fixed),
            )
    elif model_type in ("mask2former", "maskformer"):  # in training nothing is resized to multiples of it
        further = {"size_divisor": 0, "do_reduce_labels": False}
    return PROCESSORS[model_type](**{**settings, **further})


def native_form(model: PreTrainedModel) -> ExportForm:
    """The exportable form of a native model: its own outputs."""
    if model.config.model_type in UNIVERSAL:
        form = ExportForm(model, OF_MASKS, imports=("torchvision",))
        form.module = PlainOutputs(_with_plain_probabilities(model), form.read)
        return form
    return MaskedQueriesForm(model, OF_BOXES, imports=("torchvision",))


def _with_plain_probabilities(model: PreTrainedModel) -> PreTrainedModel:
    """EoMT with numbers in place of the buffer whose values say which of its blocks mask their attention; all else is
    shared with it. Other models are returned as they are."""
    buffer = "attn_mask_probs"
    if buffer not in model._buffers:
        return model
    made = copy.copy(model)
    made._buffers = {name: value for name, value in model._buffers.items() if name != buffer}
    made.__dict__[buffer] = model.get_buffer(buffer).tolist()
    return made


class MaskedQueriesForm(QueriesForm):
    """One row per query with its class, box and mask, in any order."""

    def agreement(self, wanted: Sequence[Tensor], got: Sequence[Tensor]) -> Agreement:
        """That of classes and boxes."""
        return super().agreement(wanted[:2], got[:2])
