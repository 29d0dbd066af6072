"""The deepest stride of a student, below which an image has no cell of its own in the coarsest map."""

from torch import nn

from cankd_hf.features.auto_taps import AUTO_TAPS
from cankd_hf.features.inputs import input_rule
from cankd_hf.features.taps import Taps

# Height and width at which strides are measured: a multiple of the usual strides and patches.
MEASURED_AT = (224, 224)


def deepest_stride(model: nn.Module) -> float | None:
    """Pixels per cell of the coarsest map of a model's backbone, or of its known taps if it has no backbone.

    Measured by a forward of one synthetic image. None if the model has neither. Maps that a neck adds below the
    backbone do not count: they hold one cell for an image of any size.
    """
    from transformers import PreTrainedModel
    from transformers.backbone_utils import BackboneMixin

    known = isinstance(model, PreTrainedModel) and model.config.model_type in AUTO_TAPS
    parts: list[nn.Module] = [module for module in model.modules() if isinstance(module, BackboneMixin)]
    part = parts[0] if parts else model if known else None
    if part is None:
        return None
    taps = Taps(part)
    try:
        return max(level.stride for level in taps.levels(input_rule(part).size(MEASURED_AT)))
    finally:
        taps.remove()
