"""DINO of its authors (IDEA-Research/DINO) and of MMDetection: settings as fields of `DINOConfig`, and the tensors."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from cankd_hf.convert.backbones import backbone
from cankd_hf.convert.detectors import PAIR, only
from cankd_hf.convert.reading import Checkpoint
from cankd_hf.convert.rules import Plan, Rule
from cankd_hf.convert.swin import is_swin, swin
from cankd_hf.errors import InputError
from cankd_hf.models.dino.configuration_cankd_dino import GROUPS
from cankd_hf.models.torchvision_heads import NO_CLASS

LAYER = r"model\.(encoder|decoder)\.layers\.(\d+)\."
# Ours -> theirs, of OpenMMLab and of the authors, after whose names ours are called.
OPENMMLAB = {
    r"model\.level_embed": "level_embed",
    r"model\.query_embed\.weight": "query_embedding.weight",
    r"model\.enc_output" + PAIR: r"memory_trans_fc.\1",
    r"model\.enc_output_norm" + PAIR: r"memory_trans_norm.\1",
    LAYER + r"mlp\.fc1" + PAIR: r"\1.layers.\2.ffn.layers.0.0.\3",
    LAYER + r"mlp\.fc2" + PAIR: r"\1.layers.\2.ffn.layers.1.\3",
    LAYER + r"self_attn_layer_norm" + PAIR: r"\1.layers.\2.norms.0.\3",
    r"model\.encoder\.layers\.(\d+)\.final_layer_norm" + PAIR: r"encoder.layers.\1.norms.1.\2",
    r"model\.decoder\.layers\.(\d+)\.encoder_attn_layer_norm" + PAIR: r"decoder.layers.\1.norms.1.\2",
    r"model\.decoder\.layers\.(\d+)\.final_layer_norm" + PAIR: r"decoder.layers.\1.norms.2.\2",
    r"model\.encoder\.layers\.(\d+)\.self_attn\.(.+)": r"encoder.layers.\1.self_attn.\2",
    r"model\.decoder\.layers\.(\d+)\.encoder_attn\.(.+)": r"decoder.layers.\1.cross_attn.\2",
    r"model\.decoder\.layers\.(\d+)\.self_attn\.o_proj" + PAIR: r"decoder.layers.\1.self_attn.attn.out_proj.\2",
    r"model\.decoder\.norm" + PAIR: r"decoder.norm.\1",
    r"model\.decoder\.reference_head\.(.+)": r"decoder.ref_point_head.\1",
}
AUTHORS = {
    r"model\.level_embed": "transformer.level_embed",
    r"model\.query_embed\.weight": "transformer.tgt_embed.weight",
    r"model\.input_proj\.(.+)": r"input_proj.\1",
    r"model\.(enc_output|enc_output_norm)" + PAIR: r"transformer.\1.\2",
    LAYER + r"mlp\.fc([12])" + PAIR: r"transformer.\1.layers.\2.linear\3.\4",
    r"model\.encoder\.layers\.(\d+)\.self_attn_layer_norm" + PAIR: r"transformer.encoder.layers.\1.norm1.\2",
    r"model\.encoder\.layers\.(\d+)\.final_layer_norm" + PAIR: r"transformer.encoder.layers.\1.norm2.\2",
    r"model\.decoder\.layers\.(\d+)\.self_attn_layer_norm" + PAIR: r"transformer.decoder.layers.\1.norm2.\2",
    r"model\.decoder\.layers\.(\d+)\.encoder_attn_layer_norm" + PAIR: r"transformer.decoder.layers.\1.norm1.\2",
    r"model\.decoder\.layers\.(\d+)\.final_layer_norm" + PAIR: r"transformer.decoder.layers.\1.norm3.\2",
    r"model\.encoder\.layers\.(\d+)\.self_attn\.(.+)": r"transformer.encoder.layers.\1.self_attn.\2",
    r"model\.decoder\.layers\.(\d+)\.encoder_attn\.(.+)": r"transformer.decoder.layers.\1.cross_attn.\2",
    r"model\.decoder\.layers\.(\d+)\.self_attn\.o_proj" + PAIR: r"transformer.decoder.layers.\1.self_attn.out_proj.\2",
    r"model\.decoder\.norm" + PAIR: r"transformer.decoder.norm.\1",
    r"model\.decoder\.reference_head\.(.+)": r"transformer.decoder.ref_point_head.\1",
    r"bbox_embed\.(.+)": r"bbox_embed.\1",
    r"encoder_bbox_embed\.(.+)": r"transformer.enc_out_bbox_embed.\1",
}
# Field of `DINOConfig`: where OpenMMLab's configuration says it, and where the authors' arguments do.
SETTINGS = {
    "encoder_attention_heads": ("encoder.layer_cfg.self_attn_cfg.num_heads", "nheads"),
    "decoder_attention_heads": ("decoder.layer_cfg.cross_attn_cfg.num_heads", "nheads"),
    "position_temperature": ("positional_encoding.temperature", "pe_temperatureH"),
    "position_offset": ("positional_encoding.offset", "none"),
    "num_denoising": ("dn_cfg.group_cfg.num_dn_queries", "dn_number"),
    "label_noise_ratio": ("dn_cfg.label_noise_scale", "dn_label_noise_ratio"),
    "box_noise_scale": ("dn_cfg.box_noise_scale", "dn_box_noise_scale"),
    "class_loss_coefficient": ("bbox_head.loss_cls.loss_weight", "cls_loss_coef"),
    "bbox_loss_coefficient": ("bbox_head.loss_bbox.loss_weight", "bbox_loss_coef"),
    "giou_loss_coefficient": ("bbox_head.loss_iou.loss_weight", "giou_loss_coef"),
    "focal_alpha": ("bbox_head.loss_cls.alpha", "focal_alpha"),
}
# What changes the forward pass without a tensor that shows it: each must be as here, where the file says it.
FIXED: dict[str, Any] = {
    "positional_encoding.normalize": True,
    **{"two_stage_type": "standard", "embed_init_tgt": True, "decoder_sa_type": "sa", "dilation": False},
    **{"transformer_activation": "relu", "decoder_module_seq": ["sa", "ca", "ffn"], "use_deformable_box_attn": False},
    **{"position_embedding": "sine", "num_patterns": 0, "two_stage_learn_wh": False},
}
COCO_ROWS = 91  # of the authors' heads, one for each number up to the largest of COCO's categories


def dino(made: Checkpoint, style: str) -> Plan:
    """DINO with any ResNet of `backbone` or a Swin; which of the two it comes from is told by the names."""
    own = "transformer.level_embed" in made.state
    root = "transformer." if own else ""
    if own:
        made.state = {re.sub(r"^backbone\.0\.(body\.)?", "backbone.", name): x for name, x in made.state.items()}
    for setting, known in FIXED.items():
        only(made, setting, known, setting)
    levels, width = (made.shape(f"{root}level_embed", place) for place in (0, 1))
    first = "input_proj.{}.0.weight" if own else "neck.convs.{}.conv.weight"
    taken = sum(made.shape(first.format(i), 2) == 1 for i in range(made.count(first)))  # the others are 3x3
    indices = list(range(5 - taken, 5))
    plan = swin(made, indices) if is_swin(made) else backbone(made, "dino", style, indices, None)
    plan.unused["counters of the norms, which are frozen here"] = r"\.num_batches_tracked$"
    plan.rules = [dataclasses.replace(rule, ours=r"model\." + rule.ours) for rule in plan.rules]
    only(made, "groups of the neck's norms", GROUPS, "neck.norm_cfg.num_groups")
    said = {field: made.setting(paths[own]) for field, paths in SETTINGS.items()}
    plan.fields |= {field: value for field, value in said.items() if value is not None}
    plan.fields |= {"d_model": width, "num_feature_levels": levels}
    plan.fields["num_queries"] = made.shape("transformer.tgt_embed.weight" if own else "query_embedding.weight", 0)
    for part, attention in (("encoder", "self_attn"), ("decoder", "cross_attn")):
        plan.fields |= _sizes(made, f"{root}{part}", part, attention, plan.fields, levels)
    plan.rules += [Rule(ours, theirs) for ours, theirs in (AUTHORS if own else OPENMMLAB).items()]
    plan.rules += _joined(f"{root}decoder.layers." + r"\1.self_attn." + ("" if own else "attn."))
    if own:
        _authors_heads(made, plan)
    else:
        _openmmlab_rest(plan, taken)
        plan.fields["num_labels"] = made.shape("bbox_head.cls_branches.0.weight", 0)
    if not own and not made.settings:
        plan.notes.append("places: as usual (assumed; OpenMMLab's *_improved_* has offset -0.5, temperature 10000)")
    plan.notes.append(f"DINO of {'its authors' if own else 'OpenMMLab'}: {taken} of {levels} scales from the backbone")
    return plan


def _sizes(
    made: Checkpoint, name: str, part: str, attention: str, fields: dict[str, Any], levels: int
) -> dict[str, int]:
    """Number and width of the layers of a half, and the points of its attention."""
    own = name.startswith("transformer.")
    weights = made.shape(f"{name}.layers.0.{attention}.attention_weights.weight", 0)
    heads = fields.get(f"{part}_attention_heads", 8)
    points, rest = divmod(weights, heads * levels)
    if rest or not points:
        raise InputError(
            f"{made.file.name}: expected {heads} heads in the {part}'s attention over {levels} scales, got "
            f"{weights} weights; not supported"
        )
    return {
        f"{part}_layers": made.count(f"{name}.layers.{{}}.{attention}.attention_weights.weight"),
        f"{part}_ffn_dim": made.shape(f"{name}.layers.0.{'linear1' if own else 'ffn.layers.0.0'}.weight", 0),
        f"{part}_n_points": points,
    }


def _joined(theirs: str) -> list[Rule]:
    """PyTorch's attention has queries, keys and values in one tensor, one under the other."""

    def part(place: int) -> Callable[[Tensor], Tensor]:
        return lambda x: x.chunk(3)[place]

    ours = r"model\.decoder\.layers\.(\d+)\.self_attn\."
    return [
        Rule(ours + rf"{name}_proj\.(weight|bias)", theirs + r"in_proj_\2", part(place))
        for place, name in enumerate("qkv")
    ]


def _openmmlab_rest(plan: Plan, taken: int) -> None:
    """The neck, whose further levels are apart, and heads of which the last is the encoder's."""
    last = plan.fields["decoder_layers"]
    plan.fields |= {"share_heads": False, "box_edge": 1e-5}

    def of_neck(match: re.Match[str]) -> str:
        place, part = int(match[1]), "gn" if match[2] == "1" else "conv"
        group = f"convs.{place}" if place < taken else f"extra_convs.{place - taken}"
        return f"neck.{group}.{part}.{match[3]}"

    def of_boxes(match: re.Match[str]) -> str:
        place = last if match[1] is None else match[1]
        return f"bbox_head.reg_branches.{place}.{2 * int(match[2])}.{match[3]}"

    plan.rules += [
        Rule(r"model\.input_proj\.(\d+)\.(0)\.(bias)", of_neck, optional=True),  # absent beside a norm
        Rule(r"model\.input_proj\.(\d+)\.([01])" + PAIR, of_neck),
        Rule(r"model\.label_embed\.weight", "dn_query_generator.label_embedding.weight"),
        Rule(r"class_embed\.(\d+)" + PAIR, r"bbox_head.cls_branches.\1.\2"),
        Rule(r"encoder_class_embed" + PAIR, rf"bbox_head.cls_branches.{last}.\1"),
        Rule(r"(?:bbox_embed\.(\d+)|encoder_bbox_embed)\.layers\.(\d)" + PAIR, of_boxes),
    ]


def _authors_heads(made: Checkpoint, plan: Plan) -> None:
    """Heads, in the file for each layer and again under the decoder; rows of classes that COCO has not."""
    count = made.shape("class_embed.0.weight", 0)
    heads = [name for name in made.state if re.match(r"(class|bbox)_embed\.", name)]
    for name in heads:
        again = made.state.get(f"transformer.decoder.{name}")
        if again is not None and not torch.equal(again, made.state[name]):
            raise InputError(f"{made.file.name}: expected transformer.decoder.{name} to equal {name}; not supported")
    plan.unused["heads named twice"] = r"^transformer\.decoder\.(class|bbox)_embed\."
    firsts = {name: made.state[re.sub(r"_embed\.\d+\.", "_embed.0.", name)] for name in heads}
    shared = all(torch.equal(made.state[name], first) for name, first in firsts.items())
    plan.fields["share_heads"] = shared
    if shared:
        plan.unused["heads of further layers, equal to the first"] = r"^(class|bbox)_embed\.[1-9]\d*\."
    only(
        made, "equal temperatures of rows and columns", plan.fields.get("position_temperature", 20), "pe_temperatureW"
    )
    categories = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    rows = list(range(count))
    if count == COCO_ROWS == len(categories) and made.classes is None and made.labels is None:
        rows = [row for row, name in enumerate(categories) if name not in NO_CLASS]
        made.classes = [categories[row] for row in rows]
        plan.notes.append(f"classes: of {COCO_ROWS} rows those {len(rows)} with a category of COCO (--labels: all)")
    plan.fields["num_labels"] = len(rows)

    def chosen(x: Tensor) -> Tensor:
        return x[rows]

    plan.rules += [
        Rule(r"model\.label_embed\.weight", "label_enc.weight", chosen),  # its last rows are of no class
        Rule(r"class_embed\.(\d+)" + PAIR, r"class_embed.\1.\2", chosen),
        Rule(r"encoder_class_embed" + PAIR, r"transformer.enc_out_class_embed.\1", chosen),
    ]
