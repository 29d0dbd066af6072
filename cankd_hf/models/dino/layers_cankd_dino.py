"""Encoder and decoder of DINO on the layers of Deformable DETR in `transformers`, and how their weights start.

This file travels with every saved detector, so it imports nothing of `cankd_hf`. Letters in shapes: B batch, S cells
of all scales together, C `d_model`, N queries, L decoder layers.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.models.deformable_detr.modeling_deformable_detr import (
    DeformableDetrDecoder,
    DeformableDetrDecoderOutput,
    DeformableDetrEncoder,
    DeformableDetrMLPPredictionHead,
    DeformableDetrMultiscaleDeformableAttention,
    DeformableDetrPreTrainedModel,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_cankd_dino import DINOConfig

REFERENCE_TEMPERATURE = 10000.0  # of the sine embedding of boxes, in the authors' `gen_sineembed_for_position`
EDGE = 1e-3  # the smallest share in the logit of a box between layers, of the authors and of OpenMMLab


def sine_embedding(values: Tensor, width: int, temperature: float) -> Tensor:
    """Numbers in 0..1 `[...]` -> sines and cosines in turn `[..., width]`, in float32."""
    steps = torch.arange(width, dtype=torch.float32, device=values.device)
    periods = temperature ** (2 * torch.div(steps, 2, rounding_mode="floor") / width)
    angles = values.float()[..., None] * (2 * math.pi) / periods
    return torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], dim=-1).flatten(-2)


def to_logits(boxes: Tensor, edge: float = EDGE) -> Tensor:
    """Boxes in 0..1 -> their logits, bounded near 0 and 1."""
    return torch.log(boxes.clamp(min=edge) / (1 - boxes).clamp(min=edge))


def around(heads: int, levels: int, points: int) -> Tensor:
    """Where an attention looks before training: each head in a direction of its own, 1, 2, ... cells away."""
    angles = torch.arange(heads, dtype=torch.float32) * (2 * math.pi / heads)
    directions = torch.stack([angles.cos(), angles.sin()], -1)
    directions = directions / directions.abs().amax(-1, keepdim=True)
    steps = torch.arange(1, points + 1, dtype=torch.float32)
    return (directions[:, None, None] * steps[:, None]).expand(heads, levels, points, 2).flatten()


class DINOPreTrainedModel(DeformableDetrPreTrainedModel):
    """Common base: configuration and the authors' initialisation."""

    config: DINOConfig  # type: ignore[assignment]
    config_class = DINOConfig
    base_model_prefix = "model"
    accepts_loss_kwargs = False  # the loss is a mean over boxes, never scaled by num_items_in_batch
    _no_split_modules = ["DeformableDetrEncoderLayer", "DeformableDetrDecoderLayer"]
    _supports_flash_attn = False  # denoising needs a mask of its own
    _supports_flex_attn = False

    def post_init(self) -> None:
        """Marks the layers that start at 0. Their owners cannot set them: `transformers` 5.24 calls `_init_weights` of
        code outside of it only for modules with parameters of their own."""
        attends: list[Any] = [m for m in self.modules() if isinstance(m, DeformableDetrMultiscaleDeformableAttention)]
        for module in attends:
            module.attention_weights.starts_at = ()
            module.sampling_offsets.starts_at = (module.n_heads, module.n_levels, module.n_points)
        super().post_init()

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        if hasattr(module, "starts_at"):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
            if module.starts_at:
                init.copy_(module.bias, around(*module.starts_at))
        elif isinstance(module, nn.Linear | nn.Conv2d):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        else:
            super()._init_weights(module)


class DINOEncoder(DINOPreTrainedModel, DeformableDetrEncoder):
    """Deformable DETR's encoder."""


class DINODecoder(DINOPreTrainedModel, DeformableDetrDecoder):
    """Decoder layers that refine boxes step by step, with positions made of the boxes (DAB-DETR)."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.norm = nn.LayerNorm(config.d_model)
        self.reference_head = DeformableDetrMLPPredictionHead(2 * config.d_model, config.d_model, config.d_model, 2)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(  # type: ignore[override]
        self,
        inputs_embeds: Tensor,
        reference_points: Tensor,
        box_heads: Sequence[nn.Module],
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        spatial_shapes: Tensor,
        spatial_shapes_list: list[tuple[int, int]],
        level_start_index: Tensor,
        valid_ratios: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> DeformableDetrDecoderOutput:
        """Refines queries and their boxes.

        Args:
            inputs_embeds: `[B, N, C]`, content of the queries.
            reference_points: `[B, N, 4]`, their boxes.
            box_heads: of each layer.
            encoder_hidden_states: `[B, S, C]`.
            encoder_attention_mask: `[B, S]`, True where there is an image.
            spatial_shapes, spatial_shapes_list, level_start_index, valid_ratios: of the scales.
            attention_mask: `[1, 1, N, N]`, added in the attention among queries; None: all see all.
            kwargs: `output_hidden_states`, `output_attentions`.

        Returns:
            `intermediate_hidden_states` `[B, L, N, C]` after the norm, and as `intermediate_reference_points`
            `[B, L, N, 4]` the box that each layer predicts. Its gradient also reaches the layer before ("look forward
            twice"); the box that the next layer starts from has none.
        """
        hidden, start = inputs_embeds, reference_points.float()
        looked, contents, boxes = start, [], []
        ratios = torch.cat([valid_ratios, valid_ratios], -1)[:, None]
        for layer, box_head in zip(self.layers, box_heads, strict=True):
            scaled = start[:, :, None] * ratios
            x, y, width, height = scaled[:, :, 0].unbind(-1)
            parts = torch.stack([y, x, width, height], dim=-1)
            embedded = sine_embedding(parts, self.config.d_model // 2, REFERENCE_TEMPERATURE).flatten(2)
            hidden = layer(
                hidden,
                self.reference_head(embedded.to(hidden.dtype)),
                scaled.to(hidden.dtype),
                spatial_shapes,
                spatial_shapes_list,
                level_start_index,
                encoder_hidden_states,  # as a positional argument for gradient checkpointing
                encoder_attention_mask,
                attention_mask=None if attention_mask is None else attention_mask.to(hidden.dtype),
                **kwargs,
            )
            contents.append(self.norm(hidden))
            boxes.append((box_head(contents[-1]).float() + to_logits(looked, self.config.box_edge)).sigmoid())
            looked = (box_head(hidden).float() + to_logits(start)).sigmoid()
            start = looked.detach()
        return DeformableDetrDecoderOutput(
            last_hidden_state=contents[-1],
            intermediate_hidden_states=torch.stack(contents, dim=1),
            intermediate_reference_points=torch.stack(boxes, dim=1),
        )


class EncoderMaps(nn.Module):
    """The encoder's output `[B, S, C]` as maps `[B, C, h, w]`, fine to coarse; a place to tap them."""

    def forward(self, memory: Tensor, sizes: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
        parts = memory.split([height * width for height, width in sizes], dim=1)
        return tuple(x.transpose(1, 2).unflatten(2, size) for x, size in zip(parts, sizes, strict=True))
