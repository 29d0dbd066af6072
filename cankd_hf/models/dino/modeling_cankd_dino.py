"""DINO (Zhang et al. 2022, arXiv:2203.03605) on the multi-scale deformable attention of `transformers`.

Boxes are those of the native detectors of `transformers`: centre x, centre y, width and height, divided by the width
and height of `pixel_values` (with its padding). Classes count from 0.

This file travels with every saved detector (`trust_remote_code=True`), so it imports nothing of `cankd_hf`.
Letters in shapes: B batch, H and W of the images, S cells of all scales together, C `d_model`, K classes, N queries,
D denoising queries, L decoder layers, n boxes of an image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoBackbone
from transformers import initialization as init
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES
from transformers.models.deformable_detr.modeling_deformable_detr import (
    DeformableDetrMLPPredictionHead,
    DeformableDetrModel,
    DeformableDetrObjectDetectionOutput,
    replace_batch_norm,
)
from transformers.models.rt_detr.modeling_rt_detr import get_contrastive_denoising_training_group
from transformers.utils.generic import can_return_tuple

from .configuration_cankd_dino import GROUPS, DINOConfig
from .layers_cankd_dino import DINODecoder, DINOEncoder, DINOPreTrainedModel, EncoderMaps, sine_embedding, to_logits
from .losses_cankd_dino import dino_loss

PRIOR = 0.01  # score of a class before training
TRAINED_STAGES = ("layer2", "layer3", "layer4", "stages.1", "stages.2", "stages.3")  # of a ResNet with a frozen stem


@dataclass
class Encoded:
    """What the encoder made of a batch, and what the attention of the decoder needs to read it."""

    memory: Tensor  # [B, S, C]
    mask: Tensor  # [B, S], True where there is an image
    grid: dict[str, Any]  # sizes and starts of the scales; valid shares [B, scales, 2]
    output: Any


class DINOModel(DINOPreTrainedModel):
    """Backbone, input projections, encoder and decoder; its forward ends after the encoder."""

    get_valid_ratio: Any = DeformableDetrModel.get_valid_ratio
    gen_encoder_output_proposals: Any = DeformableDetrModel.gen_encoder_output_proposals

    def __init__(self, config: DINOConfig) -> None:
        super().__init__(config)
        width = config.d_model
        self.backbone = AutoBackbone.from_config(config.backbone_config)
        with torch.no_grad():
            replace_batch_norm(self.backbone)
        inner, extra = list(self.backbone.channels), config.num_feature_levels - len(self.backbone.channels)
        convolutions = [nn.Conv2d(channels, width, 1) for channels in inner]
        for channels in [inner[-1], *[width] * extra][:extra]:
            convolutions.append(nn.Conv2d(channels, width, 3, stride=2, padding=1))
        norms = (nn.GroupNorm(GROUPS, width) for _ in convolutions)
        self.input_proj = nn.ModuleList(nn.Sequential(*pair) for pair in zip(convolutions, norms, strict=False))
        self.level_embed = nn.Parameter(torch.empty(config.num_feature_levels, width))
        self.encoder = DINOEncoder(config)  # type: ignore[arg-type]
        self.encoder_maps = EncoderMaps()
        self.enc_output = nn.Linear(width, width)
        self.enc_output_norm = nn.LayerNorm(width)
        self.query_embed = nn.Embedding(config.num_queries, width)
        self.label_embed = nn.Embedding(config.num_labels, width) if config.num_denoising else None
        self.decoder = DINODecoder(config)
        self.post_init()
        self.train()

    def train(self, mode: bool = True) -> "DINOModel":
        """As for every module; the stem of a ResNet stays frozen, also after loading, which would unfreeze it."""
        kind = getattr(self.config.backbone_config, "backbone", None) or self.config.backbone_config.model_type
        if self.config.freeze_stem and "resnet" in kind:
            for name, parameter in self.backbone.named_parameters():
                if not any(stage in name for stage in TRAINED_STAGES):
                    parameter.requires_grad_(False)
        return super().train(mode)

    def _init_weights(self, module: Any) -> None:
        if module is self.query_embed:  # the authors' rule for all matrices of the transformer
            init.xavier_uniform_(self.query_embed.weight)
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        """The first convolution (FSDP asks for it)."""
        return next(m for m in self.backbone.modules() if isinstance(m, nn.Conv2d))

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None, **kwargs: Any) -> Encoded:
        """Images `[B, 3, H, W]`, and a mask `[B, H, W]` that is 0 on padding, -> the encoder's output."""
        if pixel_mask is None:
            pixel_mask = torch.ones_like(pixel_values[:, 0])
        maps = list(self.backbone(pixel_values).feature_maps)
        inputs = [project(x) for project, x in zip(self.input_proj, maps, strict=False)]
        for number in range(len(maps), len(self.input_proj)):
            inputs.append(self.input_proj[number](maps[-1] if number == len(maps) else inputs[-1]))
        # In mixed precision grids and shares of the image stay in float32.
        inputs = [x.to(self.level_embed.dtype) for x in inputs]
        sizes = [(x.shape[-2], x.shape[-1]) for x in inputs]
        masks = [F.interpolate(pixel_mask[None].float(), size=size)[0].bool() for size in sizes]
        positions = [self._positions(mask) + row for mask, row in zip(masks, self.level_embed, strict=True)]
        shapes = torch.tensor(sizes, dtype=torch.long, device=pixel_values.device)
        grid = {
            "spatial_shapes": shapes,
            "spatial_shapes_list": sizes,
            "level_start_index": torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]]),
            "valid_ratios": torch.stack([self.get_valid_ratio(mask, dtype=inputs[0].dtype) for mask in masks], 1),
        }
        mask = torch.cat([mask.flatten(1) for mask in masks], 1)
        output = self.encoder(
            inputs_embeds=torch.cat([x.flatten(2).transpose(1, 2) for x in inputs], 1),
            attention_mask=mask,
            spatial_position_embeddings=torch.cat([x.flatten(1, 2) for x in positions], 1),
            **grid,
            **kwargs,
        )
        encoded = self.encoder_maps(output.last_hidden_state, sizes)
        memory = torch.cat([x.flatten(2).transpose(1, 2) for x in encoded], 1)
        return Encoded(memory, mask, grid, output)

    def _positions(self, mask: Tensor) -> Tensor:
        """Sine embedding `[B, h, w, C]` of rows, then of columns, as shares of the image without its padding."""
        parts = []
        for dim in (1, 2):
            counted = mask.float().cumsum(dim)
            last = counted.narrow(dim, counted.shape[dim] - 1, 1)
            share = (counted + self.config.position_offset) / (last + 1e-6)
            parts.append(sine_embedding(share, self.config.d_model // 2, self.config.position_temperature))
        return torch.cat(parts, dim=-1).to(self.level_embed.dtype)


class DINOForObjectDetection(DINOPreTrainedModel):
    """Object detection with DINO (see `DINOConfig`).

    Save it with `DeformableDetrImageProcessor` (keeps the aspect ratio, pads, gives `pixel_mask`) or
    `RTDetrImageProcessor` (one fixed size): their `post_process_object_detection` takes scores and classes from the
    sigmoid of `logits`, so `pipeline("object-detection", folder)` works.
    """

    def __init__(self, config: DINOConfig) -> None:
        super().__init__(config)
        self.model = DINOModel(config)
        width, heads = config.d_model, 1 if config.share_heads else config.decoder_layers
        self.class_embed = nn.ModuleList(nn.Linear(width, config.num_labels) for _ in range(heads))
        self.bbox_embed = nn.ModuleList(self._box_head() for _ in range(heads))
        self.encoder_class_embed = nn.Linear(width, config.num_labels)
        self.encoder_bbox_embed = self._box_head()
        self.loss_function = dino_loss
        self.post_init()

    def _box_head(self) -> DeformableDetrMLPPredictionHead:
        head: Any = DeformableDetrMLPPredictionHead(self.config.d_model, self.config.d_model, 4, 3)
        head.layers[-1].starts_at = ()  # boxes start at their reference
        return head

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        """Heads as PyTorch makes them; classes start at a score of 0.01."""
        if isinstance(module, nn.Linear) and not hasattr(module, "starts_at"):
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            classifies = module is self.encoder_class_embed or any(module is head for head in self.class_embed)
            init.constant_(module.bias, math.log(PRIOR / (1 - PRIOR)) if classifies else 0.0)
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        """As the model's."""
        return self.model.get_input_embeddings()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: Sequence[dict[str, Tensor]] | None = None,
        **kwargs: Any,
    ) -> DeformableDetrObjectDetectionOutput:
        """Predictions, and losses where labels are given; denoising queries join in training with labels.

        Args:
            pixel_values: `[B, 3, H, W]`, normalised; with `pixel_mask` `[B, H, W]`, 0 on padding at right and bottom.
            labels: one dictionary an image: `class_labels` `[n]` int64 from 0, `boxes` `[n, 4]` (see above).
            kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            Of the N matched queries: `logits` `[B, N, K]`, `pred_boxes` `[B, N, 4]`, what the decoder's layers made of
            them (`intermediate_hidden_states` `[B, L, N, C]`, `intermediate_reference_points` `[B, L, N, 4]`: boxes);
            of all cells `encoder_last_hidden_state` `[B, S, C]` and `enc_outputs_*`. `loss` is the sum of `loss_dict`.
        """
        seen = self.model(pixel_values, pixel_mask, **kwargs)
        proposed = self._propose(seen)
        count = proposed["boxes"].shape[1]  # N
        *noisy, mask, meta = self._denoising(labels, count)
        queries, start = self._queries(proposed["boxes"].detach(), *noisy)
        decoded = self.model.decoder(
            *(queries, start, self._of_layers(self.bbox_embed)),
            encoder_hidden_states=seen.memory,
            encoder_attention_mask=seen.mask,
            attention_mask=None if mask is None else mask[None, None],
            **seen.grid,
            **kwargs,
        )
        states, coordinates = decoded.intermediate_hidden_states, decoded.intermediate_reference_points
        pairs = zip(self._of_layers(self.class_embed), states.unbind(1), strict=True)
        classes = torch.stack([head(x) for head, x in pairs], dim=1)
        loss = loss_dict = auxiliary = None
        if labels is not None:
            last = (classes[:, -1], labels, self.device, coordinates[:, -1], self.config)
            layers = (classes, coordinates, proposed["logits"], proposed["boxes"])
            loss, loss_dict, auxiliary = self.loss_function(*last, *layers, denoising_meta_values=meta)
        own = slice(states.shape[2] - count, None)
        return DeformableDetrObjectDetectionOutput(
            loss=loss,
            loss_dict=loss_dict,
            logits=classes[:, -1, own],
            pred_boxes=coordinates[:, -1, own],
            auxiliary_outputs=auxiliary,
            last_hidden_state=states[:, -1, own],
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=seen.memory,
            encoder_hidden_states=seen.output.hidden_states,
            encoder_attentions=seen.output.attentions,
            intermediate_hidden_states=states[:, :, own],
            intermediate_reference_points=coordinates[:, :, own],
            init_reference_points=start[:, own],
            enc_outputs_class=proposed["all_logits"],
            enc_outputs_coord_logits=proposed["all_boxes"],
        )

    def _of_layers(self, heads: nn.ModuleList) -> list[nn.Module]:
        """One head for each layer of the decoder."""
        return list(heads) * (self.config.decoder_layers // len(heads))

    def _propose(self, seen: Encoded) -> dict[str, Tensor]:
        """What the encoder proposes: `all_logits` `[B, S, K]` and `all_boxes` `[B, S, 4]` (logits) of all cells;
        `logits` and `boxes` of those with the highest score of any class, which become the queries' positions."""
        cells, anchors = self.model.gen_encoder_output_proposals(
            seen.memory, ~seen.mask, seen.grid["spatial_shapes_list"]
        )
        logits, boxes = self.encoder_class_embed(cells), self.encoder_bbox_embed(cells).float() + anchors
        count = min(self.config.num_queries, logits.shape[1])
        places = logits.max(-1).values.topk(count, dim=1).indices[..., None]
        best = {
            name: x.gather(1, places.expand(-1, -1, x.shape[-1])) for name, x in (("logits", logits), ("boxes", boxes))
        }
        return {"logits": best["logits"], "boxes": best["boxes"].sigmoid(), "all_logits": logits, "all_boxes": boxes}

    def _queries(self, start: Tensor, contents: Any, boxes: Any) -> tuple[Tensor, Tensor]:
        """Contents, learned, and boxes, proposed, of all queries, denoising queries first (mixed query selection)."""
        learned = self.model.query_embed.weight[: start.shape[1]].expand(start.shape[0], -1, -1)
        if contents is not None:
            return torch.cat([contents.to(learned.dtype), learned], 1), torch.cat([boxes.sigmoid(), start], 1)
        if self.training and self.model.label_embed is not None:  # several processes ask for each gradient
            learned = learned + 0 * self.model.label_embed.weight.sum()
        return learned, start

    def _denoising(self, labels: Sequence[dict[str, Tensor]] | None, count: int) -> tuple[Any, ...]:
        """Contents `[B, D, C]` and logits of boxes `[B, D, 4]` of denoising queries, the mask `[D + N, D + N]` added
        in the attention, and what the loss needs to know of them; four times None outside of training, without labels
        and where no image has an object."""
        embedding, classes = self.model.label_embed, self.config.num_labels
        if not self.training or labels is None or embedding is None:
            return None, None, None, None

        def embed(kinds: Tensor) -> Tensor:
            """Of classes; 0 of the queries that fill up images with fewer objects."""
            return embedding(kinds.clamp(max=classes - 1).long()) * (kinds < classes)[..., None]

        settings = (self.config.num_denoising, self.config.label_noise_ratio, self.config.box_noise_scale)
        contents, boxes, mask, meta = get_contrastive_denoising_training_group(
            list(labels), classes, count, embed, *settings
        )
        if boxes is not None and not settings[-1]:
            boxes = to_logits(boxes)  # transformers 5.24 forgets it without noise
        return contents, boxes, mask, meta


DINOForObjectDetection.register_for_auto_class("AutoModelForObjectDetection")
MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES[DINOConfig.model_type] = "DINOForObjectDetection"  # for pipelines
