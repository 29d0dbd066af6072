"""DINO's state dicts with the names of its authors and of OpenMMLab, and its forward pass re-derived from them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .openmmlab import WIDTHS, Naive, State, conv, filled, linear, norm, resnet

C, HEADS, POINTS, LEVELS, QUERIES, DEPTHS, FFN = 32, 8, 2, 4, 12, {"encoder": 2, "decoder": 3}, 48
# What a part is called by the authors and by OpenMMLab.
NAMES = {
    "authors": {
        **{"level": "transformer.level_embed", "query": "transformer.tgt_embed.weight", "label": "label_enc.weight"},
        **{"fc": "transformer.enc_output", "fc norm": "transformer.enc_output_norm", "root": "transformer."},
        **{"ffn": ("linear1", "linear2"), "encoder norms": ("norm1", "norm2"), "in": "self_attn.in_proj_"},
        **{"decoder norms": ("norm2", "norm1", "norm3"), "out": "self_attn.out_proj"},
    },
    "openmmlab": {
        **{"level": "level_embed", "query": "query_embedding.weight", "root": "", "in": "self_attn.attn.in_proj_"},
        **{
            "label": "dn_query_generator.label_embedding.weight",
            "fc": "memory_trans_fc",
            "fc norm": "memory_trans_norm",
        },
        **{"ffn": ("ffn.layers.0.0", "ffn.layers.1"), "encoder norms": ("norms.0", "norms.1")},
        **{"decoder norms": ("norms.0", "norms.1", "norms.2"), "out": "self_attn.attn.out_proj"},
    },
}


def head(kind: str, place: int) -> tuple[str, list[str]]:
    """Names of the class layer and the box layers of a decoder layer; the one after the last: the encoder's."""
    if kind == "openmmlab":
        return f"bbox_head.cls_branches.{place}", [f"bbox_head.reg_branches.{place}.{i}" for i in (0, 2, 4)]
    last = place == DEPTHS["decoder"]
    names = ("transformer.enc_out_class_embed", "transformer.enc_out_bbox_embed")
    classes, boxes = names if last else (f"class_embed.{place}", f"bbox_embed.{place}")
    return classes, [f"{boxes}.layers.{i}" for i in range(3)]


def scale(kind: str, place: int) -> tuple[str, str]:
    """Names of the convolution and the norm of a scale."""
    if kind == "authors":
        return f"input_proj.{place}.0", f"input_proj.{place}.1"
    name = f"neck.convs.{place}" if place < 3 else f"neck.extra_convs.{place - 3}"
    return f"{name}.conv", f"{name}.gn"


def _shapes(kind: str, classes: int, rows: int, widths: list[int]) -> Iterator[tuple[str, Any]]:
    names = NAMES[kind]
    for place, into in enumerate([*widths[1:], widths[3]]):
        convolution, group = scale(kind, place)
        yield from conv(convolution, C, into, 3 if place == 3 else 1, kind == "authors")
        yield from norm(group, C, False)
    yield from ((names["level"], (LEVELS, C)), (names["query"], (QUERIES, C)), (names["label"], (rows, C)))
    yield from (*linear(names["fc"], C, C), *norm(names["fc norm"], C, False))
    for part, count in DEPTHS.items():
        for layer in range(count):
            name = f"{names['root']}{part}.layers.{layer}"
            attention = f"{name}.{'self_attn' if part == 'encoder' else 'cross_attn'}"
            yield from linear(f"{attention}.sampling_offsets", HEADS * LEVELS * POINTS * 2, C)
            yield from linear(f"{attention}.attention_weights", HEADS * LEVELS * POINTS, C)
            yield from (*linear(f"{attention}.value_proj", C, C), *linear(f"{attention}.output_proj", C, C))
            yield from linear(f"{name}.{names['ffn'][0]}", FFN, C)
            yield from linear(f"{name}.{names['ffn'][1]}", C, FFN)
            for one in names[f"{part} norms"]:
                yield from norm(f"{name}.{one}", C, False)
            if part == "decoder":
                yield from ((f"{name}.{names['in']}weight", (3 * C, C)), (f"{name}.{names['in']}bias", (3 * C,)))
                yield from linear(f"{name}.{names['out']}", C, C)
    decoder = f"{names['root']}decoder"
    yield from norm(f"{decoder}.norm", C, False)
    yield from (
        *linear(f"{decoder}.ref_point_head.layers.0", C, 2 * C),
        *linear(f"{decoder}.ref_point_head.layers.1", C, C),
    )
    for place in range(DEPTHS["decoder"] + 1):
        scores, boxes = head(kind, place)
        yield from linear(scores, classes, C)
        for layer, out in zip(boxes, (C, C, 4), strict=True):
            yield from linear(layer, out, C)


def swin(kind: str) -> Iterator[tuple[str, Any]]:
    """Stages as wide as those of the tiny ResNet, of which the neck reads the last three."""
    own = kind == "authors"
    width = 4 * WIDTHS[0]
    yield from conv(f"backbone.patch_embed.{'proj' if own else 'projection'}", width, 3, 4)
    yield from norm("backbone.patch_embed.norm", width, False)
    for stage in range(4):
        name = f"backbone.{'layers' if own else 'stages'}.{stage}"
        block, attention = f"{name}.blocks.0", f"{name}.blocks.0.attn{'' if own else '.w_msa'}"
        yield from (*norm(f"{block}.norm1", width, False), *norm(f"{block}.norm2", width, False))
        yield f"{attention}.relative_position_bias_table", (25, 2)
        yield f"{attention}.relative_position_index", (9, 9)
        yield from (*linear(f"{attention}.qkv", 3 * width, width), *linear(f"{attention}.proj", width, width))
        layers = ("mlp.fc1", "mlp.fc2") if own else ("ffn.layers.0.0", "ffn.layers.1")
        yield from (
            *linear(f"{block}.{layers[0]}", 2 * width, width),
            *linear(f"{block}.{layers[1]}", width, 2 * width),
        )
        if stage:
            yield from norm(f"backbone.norm{stage}", width, False)
        if stage < 3:
            yield f"{name}.downsample.reduction.weight", (2 * width, 4 * width)
            yield from norm(f"{name}.downsample.norm", 4 * width, False)
        width *= 2


def dino(kind: str, classes: int, shared: bool = False, swins: bool = False) -> State:
    """Random weights; the authors' file has its heads twice, and more rows of label embeddings than classes."""
    backbone = swin(kind) if swins else resnet()
    widths = [4 * WIDTHS[0] * 2**i for i in range(4)] if swins else [4 * width for width in WIDTHS]
    state = filled([*backbone, *_shapes(kind, classes, classes + (kind == "authors"), widths)])
    if kind == "openmmlab":
        return state
    root = "backbone.0." if swins else "backbone.0.body."
    state = {name.replace("backbone.", root, 1): x for name, x in state.items()}
    for name in list(state):
        if name.startswith(("class_embed.", "bbox_embed.")):
            if shared:
                family, _, rest = name.split(".", 2)
                state[name] = state[f"{family}.0.{rest}"]
            state[f"transformer.decoder.{name}"] = state[name]
    return state


def sines(values: Tensor, width: int, temperature: float) -> Tensor:
    """Numbers `[...]` -> `[..., width]`: sine and cosine in turn."""
    found = []
    for i in range(0, width, 2):
        angle = values * 2 * math.pi / temperature ** (i / width)
        found += [angle.sin(), angle.cos()]
    return torch.stack(found, -1)


def logit(x: Tensor, edge: float) -> Tensor:
    return (x.clamp(min=edge) / (1 - x).clamp(min=edge)).log()


class NaiveDINO(Naive):
    """The forward pass of one image without padding."""

    def __init__(self, kind: str, state: State) -> None:
        plain = {name.replace("backbone.0.body.", "backbone."): x for name, x in state.items()}
        super().__init__(plain, groups=32)
        self.kind, self.names = kind, NAMES[kind]
        self.edge = 1e-3 if kind == "authors" else 1e-5  # of the heads

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def mlp(self, names: list[str], x: Tensor) -> Tensor:
        for place, name in enumerate(names):
            x = self.linear(name, x if place == 0 else x.relu())
        return x

    def attend(self, name: str, query: Tensor, places: Tensor, memory: Tensor, sizes: list[Any]) -> Tensor:
        """Queries `[N, C]` at places `[N, 2]` (encoder) or boxes `[N, 4]` read the scales."""
        offsets = self.linear(f"{name}.sampling_offsets", query).view(-1, HEADS, LEVELS, POINTS, 2)
        weights = self.linear(f"{name}.attention_weights", query).view(-1, HEADS, LEVELS * POINTS).softmax(-1)
        values = self.linear(f"{name}.value_proj", memory).split([h * w for h, w in sizes])
        read = []
        for level, ((h, w), value) in enumerate(zip(sizes, values, strict=True)):
            steps = offsets[:, :, level] / (torch.tensor([w, h]) if places.shape[1] == 2 else 2 * POINTS)
            steps = steps if places.shape[1] == 2 else steps * places[:, None, None, 2:]
            at = (places[:, None, None, :2] + steps).transpose(0, 1)  # heads first
            maps = value.view(h, w, HEADS, -1).permute(2, 3, 0, 1)
            read.append(F.grid_sample(maps, 2 * at - 1, align_corners=False))
        mixed = (torch.cat(read, -1) * weights.transpose(0, 1)[:, None]).sum(-1)  # [heads, C / heads, N]
        return self.linear(f"{name}.output_proj", mixed.permute(2, 0, 1).flatten(1))

    def feed(self, name: str, x: Tensor) -> Tensor:
        return x + self.mlp([f"{name}.{one}" for one in self.names["ffn"]], x)

    def neck_maps(self, image: Tensor) -> list[Tensor]:
        maps = self.backbone(image)[1:]
        found = []
        for place in range(LEVELS):
            options = {"stride": 2, "padding": 1} if place == 3 else {}
            convolution, group = scale(self.kind, place)
            found.append(self.group(group, self.conv(convolution, maps[min(place, 2)], **options)))
        return found

    def __call__(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Memory `[S, C]`, logits `[N, K]` and boxes `[L, N, 4]`."""
        maps, names = self.neck_maps(image), self.names
        sizes = [tuple(x.shape[2:]) for x in maps]
        memory = torch.cat([x[0].flatten(1).T for x in maps])
        grids = [[torch.arange(n) for n in size] for size in sizes]
        cells = [torch.stack(torch.meshgrid(*grid, indexing="ij"), -1).flatten(0, 1) for grid in grids]  # y, x
        positions = []
        for level, (size, cell) in enumerate(zip(sizes, cells, strict=True)):
            share = (cell + 1) / (torch.tensor(size) + 1e-6)
            positions.append(sines(share, C // 2, 20).flatten(1) + self.state[names["level"]][level])
        centres = torch.cat(
            [((cell + 0.5) / torch.tensor(size)).flip(1) for size, cell in zip(sizes, cells, strict=True)]
        )
        position = torch.cat(positions)
        for layer in range(DEPTHS["encoder"]):
            name = f"{names['root']}encoder.layers.{layer}"
            first, second = (f"{name}.{one}" for one in names["encoder norms"])
            read = self.attend(f"{name}.self_attn", memory + position, centres, memory, sizes)
            memory = self.layer_norm(second, self.feed(name, self.layer_norm(first, memory + read)))
        start = self.proposals(memory, centres, sizes)
        return memory, *self.decode(start, memory, sizes)

    def proposals(self, memory: Tensor, centres: Tensor, sizes: list[Any]) -> Tensor:
        """Boxes `[N, 4]` of the cells with the highest scores."""
        side = torch.cat([torch.full((h * w, 2), 0.05 * 2**level) for level, (h, w) in enumerate(sizes)])
        anchors = torch.cat([centres, side], 1)
        inside = ((anchors > 0.01) & (anchors < 0.99)).all(1, keepdim=True)
        x = self.layer_norm(self.names["fc norm"], self.linear(self.names["fc"], memory * inside))
        classes, boxes = head(self.kind, DEPTHS["decoder"])
        best = self.linear(classes, x).amax(1).topk(QUERIES).indices
        found = (self.mlp(boxes, x) + (anchors / (1 - anchors)).log()).sigmoid()
        return torch.where(inside, found, 1.0)[best]

    def decode(self, start: Tensor, memory: Tensor, sizes: list[Any]) -> tuple[Tensor, Tensor]:
        names, decoder = self.names, f"{self.names['root']}decoder"
        hidden, before, boxes = self.state[names["query"]], start, []
        for layer in range(DEPTHS["decoder"]):
            name = f"{decoder}.layers.{layer}"
            norms = [f"{name}.{one}" for one in names["decoder norms"]]
            embedded = sines(start[:, [1, 0, 2, 3]], C // 2, 10000).flatten(1)
            position = self.mlp([f"{decoder}.ref_point_head.layers.{i}" for i in range(2)], embedded)
            hidden = self.layer_norm(norms[0], hidden + self.among(name, hidden, position))
            read = self.attend(f"{name}.cross_attn", hidden + position, start, memory, sizes)
            hidden = self.layer_norm(norms[2], self.feed(name, self.layer_norm(norms[1], hidden + read)))
            scores, layers = head(self.kind, layer)
            shown = self.layer_norm(f"{decoder}.norm", hidden)
            boxes.append((self.mlp(layers, shown) + logit(before, self.edge)).sigmoid())
            start = before = (self.mlp(layers, hidden) + logit(start, 1e-3)).sigmoid()
        return self.linear(scores, shown), torch.stack(boxes)

    def among(self, name: str, hidden: Tensor, position: Tensor) -> Tensor:
        """Attention of the queries to one another."""
        root = f"{name}.{self.names['in']}"
        weights, biases = self.state[f"{root}weight"].chunk(3), self.state[f"{root}bias"].chunk(3)
        inputs = (hidden + position, hidden + position, hidden)
        q, k, v = (
            F.linear(x, w, b).view(-1, HEADS, C // HEADS).transpose(0, 1)
            for x, w, b in zip(inputs, weights, biases, strict=True)
        )
        shares = (q @ k.transpose(1, 2) / (C // HEADS) ** 0.5).softmax(-1)
        return self.linear(f"{name}.{self.names['out']}", (shares @ v).transpose(0, 1).flatten(1))
