"""ResNets of OpenMMLab as backbones of transformers; ResNeXts and those with a deep stem or dilation as timm's."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cankd_hf.convert.reading import Checkpoint
from cankd_hf.convert.rules import Plan, Rule
from cankd_hf.errors import InputError

LAYERS = {"2-2-2-2": 18, "3-4-6-3": 50, "3-4-23-3": 101, "3-8-36-3": 152}
RGB = ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
# Blue, green, red. MMDetection's FCOS has the mean of Detectron's weights, its other models that of Detectron2's.
BGR_MEANS = {"fcos": [102.9801, 115.9465, 122.7717]}
BGR_MEAN = [103.53, 116.28, 123.675]


@dataclass
class Found:
    """What the tensors of a backbone show."""

    layers: list[int]
    bottleneck: bool
    groups: int
    base_width: int
    stem: int  # width
    deep: bool
    widths: list[int]
    deformable: list[int]  # stages

    @property
    def depth(self) -> int | None:
        """Its number, such as 101."""
        depth = LAYERS.get("-".join(map(str, self.layers)))
        return 34 if depth == 50 and not self.bottleneck else depth


def look(made: Checkpoint) -> Found:
    """Reads the shape of a ResNet. Raises InputError for any other backbone."""
    place = made.file.name
    layers = [made.count(f"backbone.layer{i}.{{}}.conv1.weight") for i in range(1, 5)]
    if 0 in layers:
        first = next((name for name in made.state if name.startswith("backbone.")), "none")
        raise InputError(
            f"{place}: expected a ResNet or ResNeXt backbone (backbone.layer1.0.conv1.weight ...), got {first}; "
            "others are not supported"
        )
    bottleneck = "backbone.layer1.0.conv3.weight" in made.state
    inner = made.state["backbone.layer1.0.conv2.weight"]
    groups = inner.shape[0] // inner.shape[1]
    last = "conv3" if bottleneck else "conv2"
    widths = [made.shape(f"backbone.layer{i}.0.{last}.weight", 0) for i in range(1, 5)]
    deep = "backbone.stem.0.weight" in made.state
    stem = made.shape("backbone.stem.6.weight" if deep else "backbone.conv1.weight", 0)
    offsets = [made.count(f"backbone.layer{i}.{{}}.conv2.conv_offset.weight") for i in range(1, 5)]
    deformable = [i for i, count in enumerate(offsets, 1) if count]
    if any(count not in (0, total) for count, total in zip(offsets, layers, strict=True)) or any(
        made.shape(f"backbone.layer{i}.0.conv2.conv_offset.weight", 0) != 18 for i in deformable
    ):
        raise InputError(
            f"{place}: expected plain deformable convolutions in whole stages; other kinds are not supported"
        )
    return Found(layers, bottleneck, groups, inner.shape[0] // groups, stem, deep, widths, deformable)


def told_style(made: Checkpoint, found: Found, given: str) -> tuple[str, str]:
    """`pytorch` or `caffe`, and how it was told. Raises InputError where it cannot be."""
    said = made.setting("backbone.style")
    if given != "auto":
        if said not in (None, given):
            raise InputError(f"--style: expected {said}, which the file's own configuration says, got {given}")
        return given, "as given"
    if said in ("pytorch", "caffe"):
        return said, "as the file's own configuration says"
    if found.deep or found.groups > 1:
        return "pytorch", "all ResNeXt and deep-stem models of OpenMMLab are"
    if "decode_head.conv_seg.weight" in made.state:
        return "pytorch", "all models of MMSegmentation are"
    if "level_embed" in made.state or "transformer.level_embed" in made.state:
        return "pytorch", "all published models of DINO are"
    norm = {key: made.state.get(f"backbone.bn1.{key}") for key in ("running_mean", "running_var")}
    mean, var = norm["running_mean"], norm["running_var"]
    if (
        mean is not None
        and var is not None
        and not mean.any()
        and torch.allclose(var, torch.ones_like(var), atol=1e-4)
    ):
        return "caffe", "its norms hold no statistics, as in Detectron's weights"
    raise InputError(
        f"{made.file.name}: the file does not say whether its backbone is pytorch's or caffe's; give --style caffe "
        "for a name with `caffe` in it, else --style pytorch"
    )


def pixels(made: Checkpoint, kind: str, style: str) -> tuple[list[float], list[float], bool, str]:
    """Mean and deviation of images in 0..255 in red, green, blue; whether the weights are for BGR; and the source."""
    if made.pixels is not None:
        values, source = made.pixels, "the file's own configuration"
    elif style == "caffe":
        values, source = {"mean": BGR_MEANS.get(kind, BGR_MEAN), "std": [1.0] * 3, "rgb": False}, "usual of caffe"
    else:
        values, source = {"mean": RGB[0], "std": RGB[1], "rgb": True}, "usual of pytorch"
    mean, std = [float(x) for x in values["mean"]], [float(x) for x in values["std"]]
    return (mean, std, False, source) if values["rgb"] else (mean[::-1], std[::-1], True, source)


def backbone(made: Checkpoint, kind: str, style: str, indices: list[int], stride: int | None) -> Plan:
    """The backbone's part of a plan; `indices` are its stages that the neck reads, `stride` that of a dilated one.

    Raises:
        InputError: for a backbone that cannot be carried exactly.
    """
    found = look(made)
    chosen, how = told_style(made, found, style)
    mean, std, bgr, source = pixels(made, kind, chosen)
    first = _swapped if bgr else None
    plain = not found.deep and found.groups == 1 and stride is None and not found.deformable
    if chosen == "caffe" and not plain and found.bottleneck:
        raise InputError(f"{made.file.name}: a caffe backbone with groups, a deep stem or dilation cannot be built")
    config, rules = _transformers(found, chosen, first) if plain else _timm(made, found, first, stride)
    order = "BGR, so the first convolution's channels are swapped" if bgr else "RGB"
    model = f"{config['model_type']} {config.get('backbone', f'of {found.layers} blocks')}"
    notes = [
        f"backbone: {model}, {chosen} style ({how})",
        f"images: {order}; mean {[round(x, 4) for x in mean]}, deviation {std} of red, green, blue ({source})",
    ]
    fields: dict[str, Any] = {"backbone_config": {**config, "out_indices": indices}}
    if found.deformable:
        fields["deformable_stages"] = found.deformable
        notes.append(f"deformable convolutions: in stages {found.deformable}")
    return Plan(fields, rules, (mean, std), notes=notes)


def _swapped(x: Tensor) -> Tensor:
    return x.flip(1)


def _transformers(found: Found, style: str, first: Any) -> tuple[dict[str, Any], list[Rule]]:
    config = {
        "model_type": "resnet",
        "embedding_size": found.stem,
        "hidden_sizes": found.widths,
        "depths": found.layers,
        "layer_type": "bottleneck" if found.bottleneck else "basic",
        "downsample_in_bottleneck": style == "caffe" and found.bottleneck,
    }
    stage = r"backbone\.encoder\.stages\.(\d+)\.layers\.(\d+)"

    def block(rest: str, plus: int = 0) -> Any:
        def name(match: Any) -> str:
            part = rest.format(int(match[3]) + plus) if "{}" in rest else rest
            return f"backbone.layer{int(match[1]) + 1}.{match[2]}.{part}.{match[match.lastindex]}"

        return name

    rules = [
        Rule(r"backbone\.embedder\.embedder\.convolution\.(.+)", r"backbone.conv1.\1", first),
        Rule(r"backbone\.embedder\.embedder\.normalization\.(.+)", r"backbone.bn1.\1"),
        Rule(stage + r"\.shortcut\.convolution\.(.+)", block("downsample.0")),
        Rule(stage + r"\.shortcut\.normalization\.(.+)", block("downsample.1")),
        Rule(stage + r"\.layer\.(\d+)\.convolution\.(.+)", block("conv{}", 1)),
        Rule(stage + r"\.layer\.(\d+)\.normalization\.(.+)", block("bn{}", 1)),
    ]
    return config, rules


def _timm(made: Checkpoint, found: Found, first: Any, stride: int | None) -> tuple[dict[str, Any], list[Rule]]:
    import timm

    kind = f"resnext{found.depth}_{found.groups}x{found.base_width}d" if found.groups > 1 else f"resnet{found.depth}"
    name = kind + ("c" if found.deep else "")
    if not timm.is_model(name):
        raise InputError(
            f"{made.file.name}: a backbone of {found.layers} blocks, {found.groups} groups of {found.base_width} "
            f"channels and {'a deep' if found.deep else 'a plain'} stem would be timm's {name}, which it does not have"
        )
    if stride is not None and not found.bottleneck:
        raise InputError(f"{made.file.name}: MMSegmentation dilates basic blocks otherwise than timm; not supported")
    config = {"model_type": "timm_backbone", "backbone": name, "output_stride": stride}
    stem = [
        Rule(r"backbone\._backbone\.conv1\.0\.weight", "backbone.stem.0.weight", first),
        Rule(r"backbone\._backbone\.conv1\.(\d+)\.(.+)", r"backbone.stem.\1.\2"),
        Rule(r"backbone\._backbone\.bn1\.(.+)", r"backbone.stem.7.\1"),
    ]
    if not found.deep:
        stem = [Rule(r"backbone\._backbone\.conv1\.weight", "backbone.conv1.weight", first)]
    return config, [*stem, Rule(r"backbone\._backbone\.(.+)", r"backbone.\1")]
