"""Pyramid students of depth: backbone -> neck -> one map of distances.

This file travels with every saved depth student (`trust_remote_code=True`), so it imports nothing of `cankd_hf`.
Letters in shapes: B images, H and W of the images.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import DepthEstimatorOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES
from transformers.utils.generic import can_return_tuple

from .configuration_cankd_fpn import DEPTH_HEADS, FPNConfig
from .depth_losses_cankd_fpn import depth_loss
from .modeling_cankd_fpn import FPNPreTrainedModel, PyramidFusion, conv_block, resize


class DepthHead(nn.Module):
    """Maps of the neck, fine to coarse -> values before the last function, `[B, 1, h, w]`."""

    def __init__(self, config: FPNConfig, channels: list[int]) -> None:
        super().__init__()
        width = config.head_channels
        self.context = PyramidFusion(config, channels)
        self.layers = nn.Sequential(*[conv_block(width, width, 3, config.norm) for _ in range(config.head_layers)])
        self.dropout = nn.Dropout2d(config.dropout)
        self.predictor = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.predictor(self.dropout(self.layers(self.context(maps))))


class FPNForDepthEstimation(FPNPreTrainedModel):
    """Depth estimation: backbone, neck and the `"depth"` head (see `FPNConfig`).

    Save it with `DPTImageProcessor`, whose `post_process_depth_estimation` resizes the depth, so that
    `pipeline("depth-estimation", folder)` works.
    """

    def __init__(self, config: FPNConfig) -> None:
        super().__init__(config)
        if config.head not in DEPTH_HEADS:
            raise ValueError(f"FPNForDepthEstimation: expected the head 'depth', got {config.head!r}; leave head out")
        self.head = DepthHead(config, [channels for channels, _ in self.levels])
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> DepthEstimatorOutput | tuple[Any, ...]:
        """Predicts the depth of every pixel.

        Args:
            pixel_values: `[B, 3, H, W]`, of any size.
            labels: depth in metres, `[B, h, w]`, of any size (predictions are resized to it); what is 0, negative or
                not finite is left out.
            output_hidden_states: whether to return the neck's maps as `hidden_states`.
            output_attentions: whether to return the attention maps of a backbone that has them (with eager attention).
            kwargs: `return_dict`; others are ignored, for callers that pass the same arguments to every model.

        Returns:
            `loss` (`depth_loss` of the configuration, float32; 0 where no pixel has a depth), `predicted_depth`
            `[B, H, W]` float32 (metres, or of a relative model inverse distances up to scale and shift),
            `hidden_states`, `attentions`.
        """
        maps, extras = self.maps_and_extras(pixel_values, output_hidden_states, output_attentions)
        values = resize(self.head(maps).float(), pixel_values.shape[-2:])[:, 0]
        limit = self.config.max_depth
        predicted = F.softplus(values) if limit is None else limit * values.sigmoid()
        loss = None if labels is None else depth_loss(self.config.depth_loss, predicted, labels)
        return DepthEstimatorOutput(loss=loss, predicted_depth=predicted, **extras)


FPNForDepthEstimation.register_for_auto_class("AutoModelForDepthEstimation")
MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES[FPNConfig.model_type] = "FPNForDepthEstimation"  # for pipelines
