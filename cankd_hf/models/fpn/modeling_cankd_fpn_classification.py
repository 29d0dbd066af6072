"""Students of whole images: backbone -> mean of the last map -> one linear layer.

This file travels with every saved classifier (`trust_remote_code=True`), so it imports nothing of `cankd_hf`.
Letters in shapes: B images, H and W of the images, K classes.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
from transformers.utils.generic import can_return_tuple

from .configuration_cankd_fpn import CLASSIFICATION_HEADS, FPNConfig
from .modeling_cankd_fpn import FPNPreTrainedModel

NONE = -100  # the label of an image without a class


class FPNForImageClassification(FPNPreTrainedModel):
    """Image classification: any backbone with the `"linear"` head (see `FPNConfig`)."""

    def __init__(self, config: FPNConfig) -> None:
        super().__init__(config)
        if config.head not in CLASSIFICATION_HEADS:
            raise ValueError(
                f"FPNForImageClassification: expected the head 'linear', got {config.head!r}; leave head out"
            )
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(self.levels[-1][0], config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=0.01)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput | tuple[Any, ...]:
        """Predicts the class of each image.

        Args:
            pixel_values: `[B, 3, H, W]`, of any size.
            labels: `[B]` int64; -100 is left out.
            output_hidden_states: whether to return the backbone's maps as `hidden_states`.
            output_attentions: whether to return the attention maps of a backbone that has them (with eager attention).
            kwargs: `return_dict`; others are ignored, for callers that pass the same arguments to every model.

        Returns:
            `loss` (mean cross entropy over images with a class, float32; 0 where there are none), `logits` `[B, K]`,
            `hidden_states`, `attentions`.
        """
        maps, extras = self.maps_and_extras(pixel_values, output_hidden_states, output_attentions)
        logits = self.classifier(self.dropout(maps[-1].mean((2, 3))))
        loss = None
        if labels is not None:
            total = F.cross_entropy(logits.float(), labels, ignore_index=NONE, reduction="sum")
            loss = total / (labels != NONE).sum().clamp(min=1)
        return ImageClassifierOutput(loss=loss, logits=logits, **extras)


FPNForImageClassification.register_for_auto_class("AutoModelForImageClassification")
MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[FPNConfig.model_type] = "FPNForImageClassification"  # for pipelines
