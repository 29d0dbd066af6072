"""Segmentation models of MMSegmentation: PSPNet and DeepLabV3."""

import torch
from torch import Tensor

from cankd_hf.convert.backbones import backbone
from cankd_hf.convert.reading import Checkpoint
from cankd_hf.convert.rules import Plan, Rule
from cankd_hf.errors import InputError

PARTS = r"\.(weight|bias|running_mean|running_var|num_batches_tracked)"
PAIR = r"\.(weight|bias)"
STRIDE = 8  # of the last maps of the published models (`-d8`)
AUXILIARY = "auxiliary_head"


def _base(made: Checkpoint, kind: str, style: str) -> Plan:
    """Backbone, classifier and auxiliary head."""
    if made.setting("decode_head.align_corners", False):
        raise InputError(f"{made.file.name}: expected align_corners false, got true; not supported")
    auxiliary = f"{AUXILIARY}.conv_seg.weight" in made.state
    plan = backbone(made, kind, style, [3, 4] if auxiliary else [4], _stride(made))
    weight = made.setting(f"{AUXILIARY}.loss_decode.loss_weight", 0.4) if auxiliary else 0.0
    plan.fields |= {
        "conventions": "torchvision",
        "num_labels": made.shape("decode_head.conv_seg.weight", 0),
        "head_channels": made.shape("decode_head.conv_seg.weight", 1),
        "head_layers": 0,
        "dropout": float(made.setting("decode_head.dropout_ratio", 0.1)),
        "auxiliary_weight": float(weight),
    }
    plan.notes.append(f"last maps: of stride {STRIDE if _stride(made) else 32}")
    plan.rules.append(Rule(r"head\.classifier" + PAIR, r"decode_head.conv_seg.\1"))
    if auxiliary:
        if made.count(AUXILIARY + ".convs.{}.conv.weight") != 1 or f"{AUXILIARY}.conv_cat.conv.weight" in made.state:
            raise InputError(f"{made.file.name}: expected an auxiliary head of one convolution; not supported")
        plan.rules += [
            Rule(r"head\.auxiliary\.0\.weight", f"{AUXILIARY}.convs.0.conv.weight"),
            Rule(r"head\.auxiliary\.1" + PARTS, rf"{AUXILIARY}.convs.0.bn.\1"),
            Rule(r"head\.auxiliary\.4" + PAIR, rf"{AUXILIARY}.conv_seg.\1"),
        ]
    return plan


def _stride(made: Checkpoint) -> int | None:
    """8 for dilated backbones, which all published models have; None for those that the configuration says are not."""
    strides = made.setting("backbone.strides", [1, 2, 1, 1])
    dilations = made.setting("backbone.dilations", [1, 1, 2, 4])
    if (strides, dilations) == ([1, 2, 2, 2], [1, 1, 1, 1]):
        return None
    contracts = made.setting("backbone.contract_dilation", not made.settings or "backbone" not in made.settings)
    if (strides, dilations) != ([1, 2, 1, 1], [1, 1, 2, 4]) or not contracts:
        raise InputError(
            f"{made.file.name}: expected strides [1, 2, 1, 1] with contracted dilations [1, 1, 2, 4], got {strides} "
            f"and {dilations}; not supported"
        )
    return STRIDE


def pspnet(made: Checkpoint, style: str) -> Plan:
    """PSPNet: averages over grids beside the map, then a 3x3 convolution."""
    plan = _base(made, "pspnet", style)
    bins = made.setting("decode_head.pool_scales", [1, 2, 3, 6])
    plan.fields |= {"head": "psp", "pool_bins": bins}
    plan.rules += [
        Rule(r"head\.context\.branches\.(\d+)\.0\.weight", r"decode_head.psp_modules.\1.1.conv.weight"),
        Rule(r"head\.context\.branches\.(\d+)\.1" + PARTS, r"decode_head.psp_modules.\1.1.bn.\2"),
        Rule(r"head\.context\.bottleneck\.0\.weight", "decode_head.bottleneck.conv.weight"),
        Rule(r"head\.context\.bottleneck\.1" + PARTS, r"decode_head.bottleneck.bn.\1"),
    ]
    return plan


def deeplabv3(made: Checkpoint, style: str) -> Plan:
    """DeepLabV3: dilated convolutions and the mean of the map side by side, then a 3x3 convolution."""
    plan = _base(made, "deeplabv3", style)
    rates = made.setting("decode_head.dilations", [1, 12, 24, 36])
    if rates[0] != 1 or made.count("decode_head.aspp_modules.{}.conv.weight") != len(rates):
        raise InputError(
            f"{made.file.name}: expected dilations 1 and others, one a branch, got {rates}; not supported"
        )
    width = plan.fields["head_channels"]
    plan.fields |= {"conventions": "openmmlab", "head": "aspp", "atrous_rates": rates[1:]}

    def mean_last(x: Tensor) -> Tensor:
        return torch.cat([x[:, width:], x[:, :width]], dim=1)

    place = len(rates)
    plan.rules += [
        Rule(rf"head\.context\.aspp\.convs\.{place}\.1\.weight", "decode_head.image_pool.1.conv.weight"),
        Rule(rf"head\.context\.aspp\.convs\.{place}\.2" + PARTS, r"decode_head.image_pool.1.bn.\1"),
        Rule(r"head\.context\.aspp\.convs\.(\d+)\.0\.weight", r"decode_head.aspp_modules.\1.conv.weight"),
        Rule(r"head\.context\.aspp\.convs\.(\d+)\.1" + PARTS, r"decode_head.aspp_modules.\1.bn.\2"),
        Rule(r"head\.context\.aspp\.project\.0\.weight", "decode_head.bottleneck.conv.weight", mean_last),
        Rule(r"head\.context\.aspp\.project\.1" + PARTS, r"decode_head.bottleneck.bn.\1"),
    ]
    return plan
