"""MMDetection's detectors without anchors: FCOS and RepPoints."""

import torch

from cankd_hf.convert.detectors import PAIR, check_groups, neck, only, selection, tower
from cankd_hf.convert.reading import Checkpoint
from cankd_hf.convert.rules import Plan, Rule
from cankd_hf.errors import InputError

STRIDES = [8, 16, 32, 64, 128]
HEAD = "bbox_head"


def fcos(made: Checkpoint, style: str) -> Plan:
    """FCOS: towers with group norm; how distances and centre-ness are read is not in the tensors, but in the file's
    configuration, if it has one."""
    plan = neck(made, "fcos", style, dense=True)
    only(made, "strides", STRIDES, f"{HEAD}.strides")
    if f"{HEAD}.cls_convs.0.gn.weight" not in made.state:
        raise InputError(f"{made.file.name}: expected group norm in the towers of FCOS, got none; not supported")
    check_groups(made, f"{HEAD}.norm_cfg.num_groups", plan.fields["fpn_channels"])
    linear, regression = (
        bool(made.setting(f"{HEAD}.{name}", False)) for name in ("norm_on_bbox", "centerness_on_reg")
    )
    plan.fields |= {
        "head": "fcos",
        "num_labels": made.shape(f"{HEAD}.conv_cls.weight", 0),
        "head_layers": made.count(HEAD + ".cls_convs.{}.conv.weight"),
        "distances": "linear" if linear else "exponential",
        "centerness_on": "regression" if regression else "classification",
    }
    source = "the file's own configuration" if made.setting(HEAD) else "assumed: as MMDetection's fcos_*_gn-head"
    how, which = plan.fields["distances"], plan.fields["centerness_on"]
    plan.notes.append(f"head: {how} distances, centre-ness of the {which} tower ({source})")
    selection(made, plan, 0.05, 0.5)
    classes, boxes = r"head\.head\.classification_head\.", r"head\.head\.regression_head\."
    plan.rules += [
        *_sequence(classes, "cls_convs", plan.fields["head_layers"]),
        *_sequence(boxes, "reg_convs", plan.fields["head_layers"]),
        Rule(classes + "cls_logits" + PAIR, rf"{HEAD}.conv_cls.\1"),
        Rule(boxes + "bbox_reg" + PAIR, rf"{HEAD}.conv_reg.\1"),
        Rule(boxes + "bbox_ctrness" + PAIR, rf"{HEAD}.conv_centerness.\1"),
        Rule(r"head\.head\.level_scales", "scales"),
    ]
    _stack_scales(made)
    return plan


def _sequence(ours: str, theirs: str, count: int) -> list[Rule]:
    """torchvision's tower is one sequence of convolution, norm and ReLU; its convolutions have biases, those of
    OpenMMLab with a norm mostly have none."""
    rules = []
    for place in range(count):
        name = rf"{HEAD}.{theirs}.{place}"
        rules += [
            Rule(rf"{ours}conv\.{3 * place}\.weight", f"{name}.conv.weight"),
            Rule(rf"{ours}conv\.{3 * place}\.bias", f"{name}.conv.bias", optional=True),
            Rule(rf"{ours}conv\.{3 * place + 1}" + PAIR, rf"{name}.gn.\1"),
        ]
    return rules


def _stack_scales(made: Checkpoint) -> None:
    """The factors of the levels, each a tensor of its own, as one."""
    names = [f"{HEAD}.scales.{level}.scale" for level in range(made.count(HEAD + ".scales.{}.scale"))]
    if names:
        made.state["scales"] = torch.stack([made.state.pop(name).reshape(()) for name in names])


def reppoints(made: Checkpoint, style: str) -> Plan:
    """RepPoints with the moment transform."""
    plan = neck(made, "reppoints", style, dense=True)
    only(made, "strides", STRIDES, f"{HEAD}.point_strides")
    only(made, "transform", "moment", f"{HEAD}.transform_method")
    only(made, "points", 9, f"{HEAD}.num_points")
    if f"{HEAD}.cls_convs.0.gn.weight" not in made.state or f"{HEAD}.moment_transfer" not in made.state:
        raise InputError(f"{made.file.name}: expected RepPoints with group norm and moments (*_moment_*_gn)")
    check_groups(made, f"{HEAD}.norm_cfg.num_groups", plan.fields["fpn_channels"])
    plan.fields |= {
        "head": "reppoints",
        "num_labels": made.shape(f"{HEAD}.reppoints_cls_out.weight", 0),
        "head_layers": made.count(HEAD + ".cls_convs.{}.conv.weight"),
        "anchor_scale": float(made.setting(f"{HEAD}.point_base_scale", 4)),
    }
    selection(made, plan, 0.05, 0.5)
    layers = {"initial_conv": "pts_init_conv", "initial_points": "pts_init_out", "class_conv": "cls_conv"}
    layers |= {"cls_logits": "cls_out", "refined_conv": "pts_refine_conv", "refined_points": "pts_refine_out"}
    plan.rules += [
        *tower(r"head\.head\.class_tower", "cls_convs"),
        *tower(r"head\.head\.point_tower", "reg_convs"),
        *(Rule(rf"head\.head\.{ours}" + PAIR, rf"{HEAD}.reppoints_{theirs}.\1") for ours, theirs in layers.items()),
        Rule(r"head\.box_coder\.log_factor", f"{HEAD}.moment_transfer"),
    ]
    return plan
