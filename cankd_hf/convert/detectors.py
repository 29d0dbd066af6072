"""Detectors of MMDetection: their settings as fields of `FPNConfig`, and where their tensors go."""

import re
from typing import Any

from cankd_hf.convert.backbones import backbone
from cankd_hf.convert.reading import Checkpoint
from cankd_hf.convert.rules import Plan, Rule, background_boxes, background_first
from cankd_hf.errors import InputError
from cankd_hf.models.fpn.modeling_cankd_fpn import make_norm

UNUSED = {"masks of another kind (this model has boxes alone)": r"^roi_head\.(mask|semantic)_(head|roi_extractor)\."}
MASKS = "roi_head.mask_head"
MASK_PARTS = ("convs.0.conv", "convs.1.conv", "convs.2.conv", "convs.3.conv", "upsample", "conv_logits")
DEVIATIONS = ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])  # of a cascade's stages
NORM_GROUPS = 32  # of OpenMMLab's group norm where a configuration says nothing else
PAIR = r"\.(weight|bias)"


def neck(made: Checkpoint, kind: str, style: str, dense: bool) -> Plan:
    """Backbone and pyramid; of dense detectors with two more levels by convolutions."""
    laterals = made.count("neck.lateral_convs.{}.conv.weight")
    wanted, indices = (3, [2, 3, 4]) if dense else (4, [1, 2, 3, 4])
    if laterals != wanted:
        raise InputError(f"{made.file.name}: expected a neck of {wanted} levels of the backbone, got {laterals}")
    plan = backbone(made, kind, style, indices, None)
    width = made.shape("neck.lateral_convs.0.conv.weight", 0)
    normed = "neck.lateral_convs.0.gn.weight" in made.state
    plan.fields |= {"conventions": "openmmlab", "fpn_channels": width, "neck_norm": "group" if normed else "none"}
    if normed:
        check_groups(made, "neck.norm_cfg.num_groups", width)
    plan.unused = dict(UNUSED)
    plan.rules += [
        Rule(r"neck\.pyramid\.inner_blocks\.(\d+)\.0" + PAIR, r"neck.lateral_convs.\1.conv.\2"),
        Rule(r"neck\.pyramid\.inner_blocks\.(\d+)\.1" + PAIR, r"neck.lateral_convs.\1.gn.\2"),
        Rule(r"neck\.pyramid\.layer_blocks\.(\d+)\.0" + PAIR, r"neck.fpn_convs.\1.conv.\2"),
        Rule(r"neck\.pyramid\.layer_blocks\.(\d+)\.1" + PAIR, r"neck.fpn_convs.\1.gn.\2"),
    ]
    if dense:
        _extra_levels(made, plan, kind, width)
    return plan


def _extra_levels(made: Checkpoint, plan: Plan, kind: str, width: int) -> None:
    """Tells the two coarser levels by the file's configuration, else by the channels that they read."""
    channels = made.shape("neck.fpn_convs.3.conv.weight", 1)
    last = made.shape("neck.lateral_convs.2.conv.weight", 1)
    said = made.setting("neck.add_extra_convs")
    said = {"on_input": "backbone", "on_output": "neck"}.get(str(said), str(said)) if said is not None else None
    if said == "on_lateral":
        raise InputError(f"{made.file.name}: extra levels made of the lateral maps are not supported")
    if said not in ("backbone", "neck"):
        said = "neck" if channels == width and (channels != last or kind == "fcos") else "backbone"
    relu = made.setting("neck.relu_before_extra_convs", kind == "fcos")
    plan.fields |= {"extra_levels": said, "extra_relu": bool(relu)}
    plan.notes.append(
        f"levels 6 and 7: made of the {said}'s last map, {'with' if relu else 'without'} ReLU between them"
    )
    inner = "" if plan.fields["neck_norm"] == "none" else r"\.0"
    for name, place in (("p6", 3), ("p7", 4)):
        plan.rules += [
            Rule(rf"neck\.pyramid\.extra_blocks\.{name}{inner}" + PAIR, rf"neck.fpn_convs.{place}.conv.\1"),
            Rule(rf"neck\.pyramid\.extra_blocks\.{name}\.1" + PAIR, rf"neck.fpn_convs.{place}.gn.\1"),
        ]


def check_groups(made: Checkpoint, setting: str, width: int) -> None:
    """Refuses a group norm of other groups than ours."""
    theirs, ours = made.setting(setting, NORM_GROUPS), getattr(make_norm("group", width), "num_groups", None)
    if theirs != ours:
        raise InputError(
            f"{made.file.name}: expected group norm of {width} channels in {ours} groups, got {theirs}; not supported"
        )


def selection(made: Checkpoint, plan: Plan, threshold: float, overlap: float) -> None:
    """How detections are selected: by the file's configuration, else as in MMDetection's published ones."""
    first = "test_cfg.rcnn" if made.setting("test_cfg.rcnn") else "test_cfg"
    plan.fields |= {
        "score_threshold": float(made.setting(f"{first}.score_thr", threshold)),
        "nms_threshold": float(made.setting(f"{first}.nms.iou_threshold", overlap)),
        "max_detections": int(made.setting(f"{first}.max_per_img", 100)),
        "topk_candidates": int(made.setting(f"{first}.nms_pre", 1000)),
    }
    if (method := made.setting(f"{first}.nms.type", "nms")) != "nms":
        plan.notes.append(f"its configuration selects by {method}, ours by plain suppression")


def tower(ours: str, theirs: str) -> list[Rule]:
    """A tower of convolutions with or without group norm, each in a block of its own."""
    return [
        Rule(rf"{ours}\.(\d+)\.0" + PAIR, rf"bbox_head.{theirs}.\1.conv.\2"),
        Rule(rf"{ours}\.(\d+)\.1" + PAIR, rf"bbox_head.{theirs}.\1.gn.\2"),
    ]


def only(made: Checkpoint, what: str, known: Any, *settings: str) -> None:
    """Refuses settings of the file's own configuration that our heads cannot hold."""
    for setting in settings:
        if (said := made.setting(setting, known)) != known:
            raise InputError(f"{made.file.name}: expected {what} {known} ({setting}), got {said}; not supported")


def retinanet(made: Checkpoint, style: str) -> Plan:
    """RetinaNet: two towers, 9 anchors a cell."""
    plan = neck(made, "retinanet", style, dense=True)
    cells = made.shape("bbox_head.retina_reg.weight", 0) // 4
    if cells != 9:
        raise InputError(f"{made.file.name}: expected 9 anchors a cell, got {cells}; not supported")
    anchors = "bbox_head.anchor_generator"
    only(made, "scales of an octave", 3, f"{anchors}.scales_per_octave")
    only(made, "ratios", [0.5, 1.0, 2.0], f"{anchors}.ratios")
    only(made, "strides", [8, 16, 32, 64, 128], f"{anchors}.strides")
    only(made, "means", [0.0] * 4, "bbox_head.bbox_coder.target_means")
    only(made, "deviations", [1.0] * 4, "bbox_head.bbox_coder.target_stds")
    normed = "bbox_head.cls_convs.0.gn.weight" in made.state
    if normed:
        check_groups(made, "bbox_head.norm_cfg.num_groups", plan.fields["fpn_channels"])
    plan.fields |= {
        "head": "retinanet",
        "num_labels": made.shape("bbox_head.retina_cls.weight", 0) // cells,
        "head_layers": made.count("bbox_head.cls_convs.{}.conv.weight"),
        "norm": "group" if normed else "none",
        "anchor_scale": float(made.setting(f"{anchors}.octave_base_scale", 4)),
    }
    selection(made, plan, 0.05, 0.5)
    plan.rules += [
        *tower(r"head\.head\.classification_head\.conv", "cls_convs"),
        *tower(r"head\.head\.regression_head\.conv", "reg_convs"),
        Rule(r"head\.head\.classification_head\.cls_logits" + PAIR, r"bbox_head.retina_cls.\1"),
        Rule(r"head\.head\.regression_head\.bbox_reg" + PAIR, r"bbox_head.retina_reg.\1"),
    ]
    return plan


def _proposals(made: Checkpoint, kind: str, style: str) -> Plan:
    """What the two-stage detectors share: the region proposals."""
    plan = neck(made, kind, style, dense=False)
    anchors = "rpn_head.anchor_generator"
    only(made, "ratios", [0.5, 1.0, 2.0], f"{anchors}.ratios")
    only(made, "strides", [4, 8, 16, 32, 64], f"{anchors}.strides")
    only(made, "deviations", [1.0] * 4, "rpn_head.bbox_coder.target_stds")
    if made.shape("rpn_head.rpn_cls.weight", 0) != 3:
        raise InputError(f"{made.file.name}: expected 3 anchors a cell of the proposals; not supported")
    scales = made.setting(f"{anchors}.scales", [8])
    if not isinstance(scales, list) or len(scales) != 1:
        raise InputError(f"{made.file.name}: expected one scale of anchors, got {scales}; not supported")
    plan.fields |= {"head": kind, "anchor_scale": float(scales[0])}
    plan.rules += [
        Rule(r"head\.rpn\.head\.conv\.0\.0" + PAIR, r"rpn_head.rpn_conv.\1"),
        Rule(r"head\.rpn\.head\.cls_logits" + PAIR, r"rpn_head.rpn_cls.\1"),
        Rule(r"head\.rpn\.head\.bbox_pred" + PAIR, r"rpn_head.rpn_reg.\1"),
    ]
    selection(made, plan, 0.05, 0.5)
    plan.fields["topk_candidates"] = 1000
    return plan


def _masks(made: Checkpoint, plan: Plan, stages: list[str]) -> None:
    """The mask branch of each stage, if it is Mask R-CNN's: four 3x3 convolutions, one that doubles the sides, a
    mask for each class. `stages`: what stands for a stage in names, such as `.0`; nothing for the only one."""
    theirs = {name for name in made.state if name.startswith("roi_head.mask_") or "semantic" in name}
    expected = {f"{MASKS}{i}.{part}.{x}" for i in stages for part in MASK_PARTS for x in ("weight", "bias")}
    if not theirs:
        return
    count = plan.fields["num_labels"]
    if theirs != expected or made.shape(f"{MASKS}{stages[0]}.conv_logits.weight", 0) != count:
        plan.notes.append("masks: of another kind than Mask R-CNN's, left out")
        return
    only(made, "threshold of masks", 0.5, "test_cfg.rcnn.mask_thr_binary")
    plan.fields["masks"] = True
    plan.notes.append("masks: taken (FPNForInstanceSegmentation)")
    ours = r"head\.mask_branch(?:es(\.\d))?\."

    def place(match: re.Match[str], part: str) -> str:
        return f"{MASKS}{match[1] or ''}.{part}.{match[match.lastindex or 0]}"

    plan.rules += [
        Rule(ours + r"head\.(\d)\.0" + PAIR, lambda match: place(match, f"convs.{match[2]}.conv")),
        Rule(ours + r"predictor\.conv5_mask" + PAIR, lambda match: place(match, "upsample")),
        Rule(ours + r"predictor\.mask_fcn_logits" + PAIR, lambda match: place(match, "conv_logits")),
    ]


def faster_rcnn(made: Checkpoint, style: str) -> Plan:
    """Faster R-CNN, also with masks: one box head, a regression for each class."""
    plan = _proposals(made, "faster_rcnn", style)
    head = "roi_head.bbox_head"
    only(made, "deviations", [0.1, 0.1, 0.2, 0.2], f"{head}.bbox_coder.target_stds")
    count = made.shape(f"{head}.fc_cls.weight", 0) - 1
    if made.shape(f"{head}.fc_reg.weight", 0) != 4 * count:
        raise InputError(f"{made.file.name}: expected a box regression for each of {count} classes; not supported")
    plan.fields |= {"num_labels": count, "head_channels": made.shape(f"{head}.shared_fcs.0.weight", 0)}
    ours = r"head\.roi_heads\."
    plan.rules += [
        Rule(ours + r"box_head\.fc6" + PAIR, rf"{head}.shared_fcs.0.\1"),
        Rule(ours + r"box_head\.fc7" + PAIR, rf"{head}.shared_fcs.1.\1"),
        Rule(ours + r"box_predictor\.cls_score" + PAIR, rf"{head}.fc_cls.\1", background_first),
        Rule(ours + r"box_predictor\.bbox_pred" + PAIR, rf"{head}.fc_reg.\1", background_boxes),
    ]
    _masks(made, plan, [""])
    return plan


def cascade_rcnn(made: Checkpoint, style: str) -> Plan:
    """Cascade R-CNN, also with masks: three box heads, each with one regression for all classes."""
    plan = _proposals(made, "cascade_rcnn", style)
    head = "roi_head.bbox_head"
    stages = made.count(head + ".{}.fc_cls.weight")
    if stages != 3 or made.shape(f"{head}.0.fc_reg.weight", 0) != 4:
        raise InputError(f"{made.file.name}: expected 3 stages with one box regression for all classes; not supported")
    said = made.setting("roi_head.bbox_head")
    for place, one in enumerate(said if isinstance(said, list) else []):
        stds = (one.get("bbox_coder") or {}).get("target_stds", DEVIATIONS[place])
        if place < len(DEVIATIONS) and stds != DEVIATIONS[place]:
            raise InputError(f"{made.file.name}: expected deviations {DEVIATIONS[place]} of stage {place}, got {stds}")
    plan.fields |= {
        "num_labels": made.shape(f"{head}.0.fc_cls.weight", 0) - 1,
        "head_channels": made.shape(f"{head}.0.shared_fcs.0.weight", 0),
    }
    ours = r"head\.stages\.(\d)\."
    plan.rules += [
        Rule(ours + r"box_head\.fc6" + PAIR, rf"{head}.\1.shared_fcs.0.\2"),
        Rule(ours + r"box_head\.fc7" + PAIR, rf"{head}.\1.shared_fcs.1.\2"),
        Rule(ours + r"box_predictor\.cls_score" + PAIR, rf"{head}.\1.fc_cls.\2", background_first),
        Rule(ours + r"box_predictor\.bbox_pred" + PAIR, rf"{head}.\1.fc_reg.\2"),
    ]
    _masks(made, plan, [f".{stage}" for stage in range(stages)])
    return plan
