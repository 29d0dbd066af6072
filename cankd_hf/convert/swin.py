"""Swin transformers of OpenMMLab and of DINO's authors as those of transformers."""

import re
from collections.abc import Callable

from torch import Tensor

from cankd_hf.convert.backbones import pixels
from cankd_hf.convert.reading import Checkpoint
from cankd_hf.convert.rules import Plan, Rule
from cankd_hf.errors import InputError

PAIR = r"\.(weight|bias)"
# How parts are called: by the authors (who have Microsoft's own names), and by OpenMMLab.
NAMES = {
    True: {"embed": "proj", "stages": "layers", "attention": "attn", "first": "mlp.fc1", "second": "mlp.fc2"},
    False: {
        **{"embed": "projection", "stages": "stages", "attention": "attn.w_msa"},
        **{"first": "ffn.layers.0.0", "second": "ffn.layers.1"},
    },
}
UNUSED = {"tables of places, made anew": r"\.relative_position_index$"}


def is_swin(made: Checkpoint) -> bool:
    """Whether the backbone is one."""
    return any(f"backbone.patch_embed.{names['embed']}.weight" in made.state for names in NAMES.values())


def swin(made: Checkpoint, indices: list[int]) -> Plan:
    """The backbone's part of a plan; `indices` are its stages that the neck reads, from 1 on.

    Raises:
        InputError: for another kind of Swin, such as Swin V2.
    """
    own = "backbone.patch_embed.proj.weight" in made.state
    names = NAMES[own]
    stages, embed = f"backbone.{names['stages']}", f"backbone.patch_embed.{names['embed']}.weight"
    width, patch = made.shape(embed, 0), made.shape(embed, 2)
    table = names["attention"] + ".relative_position_bias_table"
    places = [f"{stages}.{i}.blocks.0.{table}" for i in range(4)]
    window = round((made.shape(places[0], 0) ** 0.5 + 1) / 2)
    hidden = made.shape(f"{stages}.0.blocks.0.{names['first']}.weight", 0)
    if (
        hidden % width
        or (2 * window - 1) ** 2 != made.shape(places[0], 0)
        or "backbone.absolute_pos_embed" in made.state
    ):
        raise InputError(f"{made.file.name}: expected a Swin transformer (V1) with relative places; not supported")
    config = {
        "model_type": "swin",
        "embed_dim": width,
        "patch_size": patch,
        "depths": [made.count(f"{stages}.{i}.blocks.{{}}.norm1.weight") for i in range(4)],
        "num_heads": [made.shape(place, 1) for place in places],
        "window_size": window,
        "mlp_ratio": float(hidden // width),
        "image_size": 384 if window == 12 else 224,  # of the first training; any size is taken
        "out_indices": indices,
    }
    mean, std, _, source = pixels(made, "dino", "pytorch")
    notes = [
        f"backbone: swin of {config['depths']} blocks, {width} channels, windows of {window}",
        f"images: RGB; mean {[round(x, 4) for x in mean]}, deviation {std} of red, green, blue ({source})",
    ]
    if made.pixels is not None and not made.pixels["rgb"]:
        raise InputError(f"{made.file.name}: expected a Swin transformer for RGB images, got BGR; not supported")
    return Plan({"backbone_config": config}, _rules(names, stages, own), (mean, std), dict(UNUSED), notes)


def _rules(names: dict[str, str], stages: str, own: bool) -> list[Rule]:
    block = r"backbone\.swin\.encoder\.layers\.(\d+)\.blocks\.(\d+)\."
    theirs = stages + r".\1.blocks.\2."
    attention = theirs + names["attention"]
    merge = r"backbone\.swin\.encoder\.layers\.(\d+)\.downsample\."

    def part(place: int) -> Callable[[Tensor], Tensor]:
        return lambda x: x.chunk(3)[place]

    def output(match: re.Match[str]) -> str:
        return f"backbone.norm{int(match[1]) - 1}.{match[2]}"

    order = None if own else by_place
    return [
        Rule(
            r"backbone\.swin\.embeddings\.patch_embeddings\.projection\.(.+)",
            f"backbone.patch_embed.{names['embed']}." + r"\1",
        ),
        Rule(r"backbone\.swin\.embeddings\.norm\.(.+)", r"backbone.patch_embed.norm.\1"),
        *(
            Rule(block + rf"attention\.{name}_proj" + PAIR, attention + r".qkv.\3", part(place))
            for place, name in enumerate("qkv")
        ),
        Rule(block + r"attention\.o_proj" + PAIR, attention + r".proj.\3"),
        Rule(block + r"attention\.relative_position_bias\.(.+_table)", attention + r".\3"),
        Rule(block + r"layernorm_before" + PAIR, theirs + r"norm1.\3"),
        Rule(block + r"layernorm_after" + PAIR, theirs + r"norm2.\3"),
        Rule(block + r"mlp\.fc1" + PAIR, theirs + names["first"] + r".\3"),
        Rule(block + r"mlp\.fc2" + PAIR, theirs + names["second"] + r".\3"),
        Rule(merge + r"(reduction|norm)" + PAIR, stages + r".\1.downsample.\2.\3", order),
        Rule(r"backbone\.hidden_states_norms\.stage(\d)" + PAIR, output),
        Rule(r"backbone\.swin\.layernorm" + PAIR, r"none.\1", optional=True),  # the maps do not pass through it
    ]


def by_place(x: Tensor) -> Tensor:
    """`[..., 4 C]` of four cells that become one: OpenMMLab has the four of a channel together, row by row;
    transformers the channels of a cell, column by column."""
    return x.unflatten(-1, (-1, 4))[..., [0, 2, 1, 3]].transpose(-1, -2).flatten(-2)
