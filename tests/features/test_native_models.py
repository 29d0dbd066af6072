"""Every native dense-prediction family: `auto` finds its neck, gradients reach it, a teacher stops right behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tr
from torch import nn

from cankd_hf.features import Taps
from cankd_hf.features.inputs import input_rule

RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4}
SWIN = {"model_type": "swin", "embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4, "window_size": 4}
VIT = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
MIT = {"hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 2]}
DPT = {"neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 16}
DETR = {
    **{"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 5, "decoder_layers": 2},
    **{"encoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
}
RT_DETR = {
    **{"encoder_hidden_dim": 32, "encoder_in_channels": [8, 16, 16], "encoder_ffn_dim": 32, "num_denoising": 0},
    **{"decoder_in_channels": [32] * 3, "num_feature_levels": 3},
    **DETR,
}
MASK2FORMER = {
    **{"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32},
    **{"dim_feedforward": 32, "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "num_queries": 5},
}
RF_BACKBONE = {
    **VIT,
    **{"model_type": "rf_detr_dinov2", "num_hidden_layers": 2, "num_windows": 2, "out_indices": [1, 2]},
}


def backbone(values: dict[str, Any], stages: tuple[int, ...] = (1, 2, 3, 4)) -> tr.PretrainedConfig:
    return tr.AutoConfig.for_model(**values, out_indices=list(stages))


def upernet(values: dict[str, Any]) -> tr.PreTrainedModel:
    config = tr.UperNetConfig(backbone_config=backbone(values), hidden_size=16, use_auxiliary_head=False)
    return tr.UperNetForSemanticSegmentation(config)


def maskformer() -> tr.PreTrainedModel:
    decoder = tr.DetrConfig(**DETR, backbone_config=backbone(RESNET))
    config = tr.MaskFormerConfig(
        backbone_config=backbone(SWIN), decoder_config=decoder, fpn_feature_size=32, mask_feature_size=32
    )
    return tr.MaskFormerForInstanceSegmentation(config)


def dpt(**more: Any) -> tr.PreTrainedModel:
    return tr.DPTForSemanticSegmentation(tr.DPTConfig(**VIT, **DPT, intermediate_size=32, **more))


def dpt_on_dinov2() -> tr.PreTrainedModel:
    dinov2 = tr.Dinov2Config(**VIT, out_indices=[1, 2, 3, 4], reshape_hidden_states=False, apply_layernorm=False)
    return tr.DPTForDepthEstimation(tr.DPTConfig(**DPT, backbone_config=dinov2, hidden_size=16, num_attention_heads=2))


# name -> (builder, strides that auto finds, or None where the paper's crop makes them)
MODELS: dict[str, tuple[Callable[[], tr.PreTrainedModel], list[int]]] = {
    "segformer": (
        lambda: tr.SegformerForSemanticSegmentation(tr.SegformerConfig(**MIT, decoder_hidden_size=16)),
        [4, 8, 16, 32],
    ),
    "upernet-resnet": (lambda: upernet(RESNET), [4, 8, 16, 32]),
    "upernet-swin": (lambda: upernet(SWIN), [4, 8, 16, 32]),
    "upernet-convnext": (
        lambda: upernet({"model_type": "convnext", "hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4}),
        [4, 8, 16, 32],
    ),
    "dpt": (lambda: dpt(backbone_out_indices=[0, 1, 2, 3]), [2, 4, 8, 16]),
    "dpt-dinov2": (dpt_on_dinov2, [2, 4, 8, 16]),
    "beit": (
        lambda: tr.BeitForSemanticSegmentation(
            tr.BeitConfig(**VIT, intermediate_size=32, out_indices=[1, 2, 3, 4], use_relative_position_bias=True)
        ),
        [4, 8, 16, 32],
    ),
    "data2vec": (
        lambda: tr.Data2VecVisionForSemanticSegmentation(
            tr.Data2VecVisionConfig(**VIT, intermediate_size=32, out_indices=[1, 2, 3, 4])
        ),
        [4, 8, 16, 32],
    ),
    "mobilenet_v2": (
        lambda: tr.MobileNetV2ForSemanticSegmentation(tr.MobileNetV2Config(depth_multiplier=0.1, output_stride=8)),
        [8],
    ),
    "mobilevit": (
        lambda: tr.MobileViTForSemanticSegmentation(
            tr.MobileViTConfig(
                hidden_sizes=[16, 16, 24],
                neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32],
                aspp_out_channels=16,
                initializer_range=0.5,
            )
        ),
        [32],
    ),
    "maskformer": (maskformer, [4, 8, 16]),
    "mask2former": (
        lambda: tr.Mask2FormerForUniversalSegmentation(
            tr.Mask2FormerConfig(backbone_config=backbone(SWIN), **MASK2FORMER)
        ),
        [4, 8, 16, 32],
    ),
    "eomt": (
        lambda: tr.EomtForUniversalSegmentation(
            tr.EomtConfig(**VIT, num_queries=40, num_blocks=1, num_upscale_blocks=1)
        ),
        [16],
    ),
    "eomt_dinov3": (
        lambda: tr.EomtDinov3ForUniversalSegmentation(
            tr.EomtDinov3Config(**VIT, intermediate_size=32, num_queries=7, num_blocks=1, num_upscale_blocks=1)
        ),
        [16],
    ),
    "rt_detr": (
        lambda: tr.RTDetrForObjectDetection(tr.RTDetrConfig(backbone_config=backbone(RESNET, (2, 3, 4)), **RT_DETR)),
        [8, 16, 32],
    ),
    "rt_detr_v2": (
        lambda: tr.RTDetrV2ForObjectDetection(
            tr.RTDetrV2Config(backbone_config=backbone(RESNET, (2, 3, 4)), **RT_DETR)
        ),
        [8, 16, 32],
    ),
    "d_fine": (
        lambda: tr.DFineForObjectDetection(tr.DFineConfig(backbone_config=backbone(RESNET, (2, 3, 4)), **RT_DETR)),
        [8, 16, 32],
    ),
    "detr": (lambda: tr.DetrForObjectDetection(tr.DetrConfig(backbone_config=backbone(RESNET), **DETR)), [32]),
    "deformable_detr": (
        lambda: tr.DeformableDetrForObjectDetection(
            tr.DeformableDetrConfig(backbone_config=backbone(RESNET, (2, 3, 4)), **DETR)
        ),
        [8, 16, 32, 64],
    ),
    "rf_detr": (
        lambda: tr.RfDetrForObjectDetection(
            tr.RfDetrConfig(
                backbone_config=RF_BACKBONE, d_model=32, num_queries=5, decoder_layers=1, decoder_ffn_dim=32
            )
        ),
        [16],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_auto_taps(name: str) -> None:
    build, strides = MODELS[name]
    model = build().eval()
    taps = Taps(model)
    size = input_rule(model).size((128, 128))
    levels = taps.levels(size)
    assert [round(level.stride) for level in levels] == strides

    pixels = torch.randn(2, 3, *size)
    model(pixels)
    maps = taps.collect(size)
    assert [(m.shape[1], tuple(m.shape[2:])) for m in maps] == [(level.channels, level.size) for level in levels]
    assert all(torch.isfinite(m).all() and m.std() > 0 for m in maps)
    gradients = torch.autograd.grad(sum(m.square().sum() for m in maps), first_weight(model))
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)
    with torch.no_grad():
        whole = taps.run(pixels)
    taps.remove()

    ran: list[str] = []
    for path, module in model.named_modules():
        module.register_forward_pre_hook(lambda _m, _a, path=path: ran.append(path))
    early = Taps(model, [level.tap for level in levels], stop_early=True)
    with torch.no_grad():
        again = early.run(pixels)
    assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))
    inside = [module for module in early.modules if f"{ran[-1]}.".startswith(f"{module}.")]
    assert inside, f"{ran[-1]} started after the last tap"


def first_weight(model: nn.Module) -> list[nn.Parameter]:
    """The first weight of the model, which every map depends on."""
    return [next(p for p in model.parameters() if p.ndim == 4 and p.requires_grad)]


def test_odd_sizes_and_names_that_are_taps() -> None:
    model = MODELS["segformer"][0]().eval()
    levels = Taps(model).levels((230, 190))
    assert [level.size for level in levels] == [(58, 48), (29, 24), (15, 12), (8, 6)]
    assert [level.tap for level in Taps(model, [levels[2].tap]).levels((230, 190))] == [levels[2].tap]


def test_headless_models_are_searched() -> None:
    config = tr.SegformerConfig(**MIT)
    levels = Taps(tr.SegformerModel(config)).levels((128, 128))
    assert [round(level.stride) for level in levels] == [4, 8, 16, 32]
    assert [level.channels for level in levels] == [8, 16, 24, 32]
