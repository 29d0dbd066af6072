"""Pyramid students (and teachers): backbone -> neck -> head.

This file travels with every saved student (`trust_remote_code=True`), so it imports nothing of `cankd_hf`.
Letters in shapes: B batch, C channels, H and W of that map, K classes.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.ops import FeaturePyramidNetwork
from transformers import AutoBackbone, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES
from transformers.utils.generic import can_return_tuple

from .configuration_cankd_fpn import FPNConfig, of_another
from .deformable_cankd_fpn import deform
from .levels_cankd_fpn import coarser_levels

PROBE_SIZE = 224  # divisible by every usual stride and patch: 4, 8, 14, 16, 32


def make_norm(kind: str, channels: int) -> nn.Module:
    """BatchNorm, or GroupNorm of at least 4 channels a group (so that it is defined on 1x1 maps)."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    groups = max(g for g in range(1, min(32, max(1, channels // 4)) + 1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


def conv_block(in_channels: int, out_channels: int, kernel_size: int, norm: str) -> nn.Sequential:
    """Convolution, norm, ReLU: `[B, in_channels, H, W]` -> `[B, out_channels, H, W]`."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    return nn.Sequential(conv, make_norm(norm, out_channels), nn.ReLU(inplace=True))


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, corners not aligned; equal sizes return the map itself."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=list(size), mode="bilinear", align_corners=False)


def probe(backbone: PreTrainedModel) -> list[tuple[int, float]]:
    """Channels and stride of each map, measured, because those in a configuration may be wrong.

    An empty image is run in eval mode, without gradients; also works on the meta device.
    """
    weight = next(backbone.parameters())
    image = weight.new_zeros(1, backbone.config.num_channels, PROBE_SIZE, PROBE_SIZE)
    was_training = backbone.training
    backbone.eval()
    with torch.no_grad():
        maps = backbone(image).feature_maps
    backbone.train(was_training)
    for x in maps:
        if x.ndim != 4:
            found = tuple(x.shape)
            raise ValueError(f"{type(backbone).__name__}: expected maps [B, C, H, W], got one of shape {found}")
    return [(x.shape[1], PROBE_SIZE / x.shape[3]) for x in maps]


@contextmanager
def still_statistics(module: nn.Module) -> Iterator[None]:
    """Keeps the norms inside a module from counting a batch in their running statistics."""
    norms: list[Any] = [m for m in module.modules() if getattr(m, "track_running_stats", False)]
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum, norm.num_batches_tracked = momentum, count


class FPNNeck(nn.Module):
    """Feature pyramid (torchvision's): maps of any channels, fine to coarse -> as many maps of `fpn_channels`."""

    def __init__(self, config: FPNConfig, levels: list[tuple[int, float]]) -> None:
        super().__init__()
        self.kept = self._choose(config, [stride for _, stride in levels])
        widths = [levels[i][0] for i in self.kept]
        norm = partial(make_norm, "group") if getattr(config, "neck_norm", "none") == "group" else None
        extra, factors = coarser_levels(config, widths[-1], norm)
        self.pyramid = FeaturePyramidNetwork(widths, config.fpn_channels, extra_blocks=extra, norm_layer=norm)
        strides = [levels[i][1] for i in self.kept]
        self.levels = [(config.fpn_channels, s) for s in strides + [f * strides[-1] for f in factors]]

    @staticmethod
    def _choose(config: FPNConfig, strides: list[float]) -> list[int]:
        if config.strides is None:
            return [i for i, stride in enumerate(strides) if stride >= 4] or list(range(len(strides)))
        kept = []
        for wanted in config.strides:
            nearest = max(range(len(strides)), key=lambda i: (-abs(math.log2(strides[i] / wanted)), i))
            if abs(math.log2(strides[nearest] / wanted)) > 0.3:
                raise ValueError(f"FPNConfig.strides: no map of stride {wanted}; the backbone's are {strides}")
            kept.append(nearest)
        return sorted(kept)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return list(self.pyramid({str(i): maps[i] for i in self.kept}).values())


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of `[B, C, H, W]`."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SimplePyramid(nn.Module):
    """ViTDet's simple feature pyramid: the last map of a plain ViT, resampled to several strides, no top-down path."""

    def __init__(self, config: FPNConfig, levels: list[tuple[int, float]]) -> None:
        super().__init__()
        channels, patch = levels[-1]
        self.patch = round(patch)
        self.branches = nn.ModuleList()
        self.levels: list[tuple[int, float]] = []
        for stride in sorted(config.strides or [4, 8, 16, 32]):
            octaves = round(math.log2(patch / stride))  # patch 14 counts as 16
            self.branches.append(self._branch(channels, config.fpn_channels, octaves))
            self.levels.append((config.fpn_channels, patch / 2**octaves))
        self.extra, factors = coarser_levels(config, config.fpn_channels)
        self.levels += [(config.fpn_channels, f * self.levels[-1][1]) for f in factors]

    @staticmethod
    def _branch(channels: int, out_channels: int, octaves: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        width = channels
        for i in range(octaves):
            if i > 0:
                layers += [LayerNorm2d(width), nn.GELU()]
            narrower = max(width // 2, 1)
            layers.append(nn.ConvTranspose2d(width, narrower, kernel_size=2, stride=2))
            width = narrower
        layers += [nn.MaxPool2d(2, ceil_mode=True) for _ in range(-octaves)]
        layers += [nn.Conv2d(width, out_channels, 1, bias=False), LayerNorm2d(out_channels)]
        layers += [nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False), LayerNorm2d(out_channels)]
        return nn.Sequential(*layers)

    def fit(self, pixel_values: Tensor) -> Tensor:
        """Resizes the images to a multiple of the patch: a ViT would silently crop the rest, and shift its map."""
        # Integer arithmetic, which torch.export can trace for any size.
        height, width = (max(1, (n + self.patch // 2) // self.patch) * self.patch for n in pixel_values.shape[-2:])
        return resize(pixel_values, (height, width))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        pyramid = [branch(maps[-1]) for branch in self.branches]
        return pyramid if self.extra is None else self.extra(pyramid, pyramid, [])[0]


class NoNeck(nn.Module):
    """The backbone's maps as they are."""

    def __init__(self, config: FPNConfig, levels: list[tuple[int, float]]) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return list(maps)


class PyramidFusion(nn.Module):
    """All maps projected to one width, resized to the finest and summed: a 1x1 convolution of their concatenation."""

    def __init__(self, config: FPNConfig, channels: list[int]) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Conv2d(c, config.head_channels, 1, bias=False) for c in channels)
        self.norm = make_norm(config.norm, config.head_channels)

    def forward(self, maps: list[Tensor]) -> Tensor:
        size = maps[0].shape[-2:]
        fused = self.projections[0](maps[0])
        for projection, x in zip(self.projections[1:], maps[1:], strict=True):
            fused = fused + resize(projection(x), size)
        return F.relu(self.norm(fused))


class PyramidPooling(nn.Module):
    """PSPNet's module: the last map concatenated with its averages over grids of several sizes."""

    def __init__(self, config: FPNConfig, channels: list[int]) -> None:
        super().__init__()
        self.bins = config.pool_bins
        width = config.head_channels
        self.branches = nn.ModuleList(conv_block(channels[-1], width, 1, config.norm) for _ in self.bins)
        self.bottleneck = conv_block(channels[-1] + width * len(self.bins), width, 3, config.norm)

    def forward(self, maps: list[Tensor]) -> Tensor:
        x = maps[-1]
        pooled = [
            resize(branch(F.adaptive_avg_pool2d(x, bins)), x.shape[-2:])
            for branch, bins in zip(self.branches, self.bins, strict=True)
        ]
        return self.bottleneck(torch.cat([x, *pooled], dim=1))


class AtrousPooling(nn.Module):
    """DeepLabV3's module (torchvision's ASPP) on the last map; its dropout is left to the classifier's."""

    def __init__(self, config: FPNConfig, channels: list[int]) -> None:
        super().__init__()
        self.aspp = ASPP(channels[-1], config.atrous_rates, config.head_channels)
        self.aspp.project[3] = nn.Identity()
        if config.conventions == "openmmlab":
            first, width = self.aspp.project[0], config.head_channels
            self.aspp.project[0] = nn.Conv2d(first.in_channels, width, 3, padding=1, bias=False)
        if config.norm != "batch":
            for name, layer in list(self.aspp.named_modules()):
                if isinstance(layer, nn.BatchNorm2d):
                    self.aspp.set_submodule(name, make_norm(config.norm, layer.num_features))

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.aspp(maps[-1])


NECK_CLASSES: dict[str, type[FPNNeck | SimplePyramid | NoNeck]] = {
    "fpn": FPNNeck,
    "simple_pyramid": SimplePyramid,
    "none": NoNeck,
}
CONTEXT_CLASSES = {"fpn": PyramidFusion, "psp": PyramidPooling, "aspp": AtrousPooling}


class SemanticHead(nn.Module):
    """Maps of the neck, fine to coarse -> logits `[B, K, h, w]`, and those of the auxiliary classifier in training."""

    def __init__(self, config: FPNConfig, channels: list[int]) -> None:
        super().__init__()
        width = config.head_channels
        self.context = CONTEXT_CLASSES[config.head](config, channels)
        self.layers = nn.Sequential(*[conv_block(width, width, 3, config.norm) for _ in range(config.head_layers)])
        self.dropout = nn.Dropout2d(config.dropout)
        self.classifier = nn.Conv2d(width, config.num_labels, 1)
        self.auxiliary: nn.Sequential | None = None
        if config.auxiliary_weight > 0:
            narrow = max(width // 2, 1)
            self.auxiliary = nn.Sequential(
                *conv_block(channels[max(len(channels) - 2, 0)], narrow, 3, config.norm),
                nn.Dropout2d(config.dropout),
                nn.Conv2d(narrow, config.num_labels, 1),
            )

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        try:
            context = self.context(maps)
        except ValueError as error:
            if not self.training or len(maps[-1]) > 1:
                raise
            why = "This head normalises globally pooled maps over the batch, which needs at least 2 images a step "
            raise ValueError(f"{why}and device; use a larger batch or norm: group ({error})") from error
        logits = self.classifier(self.dropout(self.layers(context)))
        spare = self.auxiliary(maps[max(len(maps) - 2, 0)]) if self.auxiliary is not None and self.training else None
        return logits, spare


class FPNPreTrainedModel(PreTrainedModel):
    """Common base of the pyramid models: configuration, initialisation, backbone and neck."""

    config: FPNConfig
    config_class = FPNConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean over pixels, never scaled by num_items_in_batch
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _no_split_modules: list[str] = []

    def __init__(self, config: FPNConfig) -> None:
        super().__init__(config)
        self.backbone = AutoBackbone.from_config(config.backbone_config)
        deform(self.backbone, config.deformable_stages)
        self.gradient_checkpointing = False
        self.recomputes_itself = any(hasattr(m, "gradient_checkpointing") for m in self.backbone.modules())
        self.neck = NECK_CLASSES[config.neck](config, probe(self.backbone))
        self.levels = self.neck.levels  # channels and stride of each map, fine to coarse

    def get_input_embeddings(self) -> nn.Module:
        """The first convolution (FSDP asks for it)."""
        return next(m for m in self.backbone.modules() if isinstance(m, nn.Conv2d))

    def _init_weights(self, module: nn.Module) -> None:
        """torchvision's rule for its FPN, for neck and head. The default of `transformers` (std 0.02) would overwrite
        torchvision's own; the backbone, a `PreTrainedModel`, initialises itself."""
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            init.kaiming_uniform_(module.weight, a=1)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            for name, buffer in module.named_buffers():  # the statistics of BatchNorm
                (init.ones_ if name == "running_var" else init.zeros_)(buffer)

    def pyramid(self, pixel_values: Tensor, attentions: list[Tensor] | None = None) -> list[Tensor]:
        """Images `[B, 3, H, W]` -> the neck's maps, fine to coarse; the backbone's attention maps go to the list."""
        if isinstance(self.neck, SimplePyramid):
            pixel_values = self.neck.fit(pixel_values)
        if attentions is None:
            return self.neck(self.backbone_maps(pixel_values))
        output = self.backbone(pixel_values, output_attentions=True)
        attentions.extend(output.attentions or ())
        return self.neck(list(output.feature_maps))

    def backbone_maps(self, pixel_values: Tensor) -> list[Tensor]:
        """The backbone's maps. With gradient checkpointing, one that has none of its own is recomputed as a whole in
        the backward pass, without counting the batch again in its running statistics."""
        if not (self.gradient_checkpointing and self.training):
            return list(self.backbone(pixel_values).feature_maps)
        if getattr(self._gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            pixel_values = pixel_values.detach().requires_grad_()  # without it there would be no gradients
        if self.recomputes_itself:
            return list(self.backbone(pixel_values).feature_maps)
        runs = itertools.count()

        def run(images: Tensor) -> tuple[Tensor, ...]:
            with still_statistics(self.backbone) if next(runs) else nullcontext():
                return tuple(self.backbone(images).feature_maps)

        return list(self._gradient_checkpointing_func(run, pixel_values))

    def maps_and_extras(self, images: Tensor, *asked: bool | None) -> tuple[list[Tensor], dict[str, Any]]:
        """The neck's maps; and `hidden_states` and `attentions`, as a call asks for them, else the configuration."""
        defaults = (self.config.output_hidden_states, self.config.output_attentions)
        hidden, attends = (default if value is None else value for value, default in zip(asked, defaults, strict=True))
        attentions: list[Tensor] = []
        maps = self.pyramid(images, attentions if attends else None)
        extras = {"hidden_states": maps if hidden else None, "attentions": attentions}
        return maps, {name: tuple(kept) for name, kept in extras.items() if kept}


class FPNForSemanticSegmentation(FPNPreTrainedModel):
    """Semantic segmentation: backbone, neck and one of three heads (see `FPNConfig`)."""

    def __init__(self, config: FPNConfig) -> None:
        super().__init__(config)
        if config.head not in CONTEXT_CLASSES:
            raise ValueError(of_another("FPNForSemanticSegmentation", config.head, CONTEXT_CLASSES))
        self.head = SemanticHead(config, [channels for channels, _ in self.levels])
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> SemanticSegmenterOutput | tuple[Any, ...]:
        """Predicts class logits at the stride of the finest level.

        Args:
            pixel_values: `[B, 3, H, W]`, of any size.
            labels: `[B, h, w]` int64, of any size (the logits are resized to it); `semantic_loss_ignore_index` is left
                out.
            output_hidden_states: whether to return the neck's maps as `hidden_states`.
            output_attentions: whether to return the attention maps of a backbone that has them (with eager attention).
            kwargs: `return_dict`; others are ignored, for callers that pass the same arguments to every model.

        Returns:
            `loss` (mean cross entropy over labelled pixels, float32; 0 where there are none), `logits` `[B, K, h, w]`,
            `hidden_states`, `attentions`.
        """
        maps, extras = self.maps_and_extras(pixel_values, output_hidden_states, output_attentions)
        logits, auxiliary = self.head(maps)
        loss = None
        if labels is not None:
            loss = self.pixel_loss(logits, labels)
            if auxiliary is not None:
                loss = loss + self.config.auxiliary_weight * self.pixel_loss(auxiliary, labels)
        return SemanticSegmenterOutput(loss=loss, logits=logits, **extras)

    def pixel_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy at the labels' resolution, in float32; 0 and not NaN when every pixel is ignored."""
        ignored = self.config.semantic_loss_ignore_index
        logits = resize(logits.float(), labels.shape[-2:])
        total = F.cross_entropy(logits, labels, ignore_index=ignored, reduction="sum")
        return total / (labels != ignored).sum().clamp(min=1)


FPNForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES[FPNConfig.model_type] = "FPNForSemanticSegmentation"  # for pipelines
