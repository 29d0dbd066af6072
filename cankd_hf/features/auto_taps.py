"""Where the maps of a model are: a table of known models, and a search for the others."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from math import log2
from typing import Any

import torch
from torch import Tensor, nn

from cankd_hf.errors import InputError
from cankd_hf.features.grids import to_maps

# model_type -> taps, fine to coarse not needed. Necks before heads: what a head reads, a student's head can use too.
# `*` stands for every child, `-1` for the last one.
AUTO_TAPS: dict[str, tuple[str, ...]] = {
    # semantic and universal segmentation
    "segformer": ("decode_head.linear_projections.*",),
    "upernet": ("decode_head.fpn_convs.*", "decode_head.bottleneck"),
    "beit": ("decode_head.fpn_convs.*", "decode_head.psp_bottleneck"),
    "data2vec-vision": ("decode_head.fpn_convs.*", "decode_head.psp_bottleneck"),
    "dpt": ("neck",),
    "mobilenet_v2": ("segmentation_head.conv_projection",),
    "mobilevit": ("segmentation_head.aspp",),
    "mobilevitv2": ("segmentation_head.aspp",),
    "maskformer": ("model.pixel_level_module.decoder.fpn",),
    "mask2former": (
        "model.pixel_level_module.decoder:mask_features",
        "model.pixel_level_module.decoder:multi_scale_features",
    ),
    "oneformer": (
        "model.pixel_level_module.decoder:mask_features",
        "model.pixel_level_module.decoder:multi_scale_features",
    ),
    "eomt": ("layers.-1",),
    "eomt_dinov3": ("layers.-1",),
    # depth
    "depth_anything": ("neck",),
    "glpn": ("decoder",),
    # detection
    "rt_detr": ("model.encoder:last_hidden_state",),
    "rt_detr_v2": ("model.encoder:last_hidden_state",),
    "d_fine": ("model.encoder:last_hidden_state",),
    "deimv2": ("model.encoder",),
    "deformable_detr": ("model.input_proj.*",),
    "detr": ("model.input_projection",),
    "table-transformer": ("model.input_projection",),
    "conditional_detr": ("model.input_projection",),
    "dab-detr": ("model.input_projection",),
    "yolos": ("vit.layernorm",),
    "rf_detr": ("model.backbone.projector",),
    "lw_detr": ("model.backbone.projector",),
    # detection by a text: the image's maps before they meet it
    "grounding-dino": ("model.input_proj_vision.*",),
    "mm-grounding-dino": ("model.input_proj_vision.*",),
    "omdet-turbo": ("encoder:extracted_states",),
    # plain ViTs, which have no Backbone class: the normalised tokens of the last block
    "vit": ("layernorm",),
    "vit_msn": ("layernorm",),
    "deit": ("layernorm",),
    "siglip_vision_model": ("post_layernorm",),
    "siglip2_vision_model": ("post_layernorm",),
    "clip_vision_model": ("encoder.layers.-1",),
    # ours
    "cankd_fpn": ("neck",),
}


def auto_taps(model: nn.Module) -> list[str]:
    """Finds a model's taps: its own feature maps if it is a backbone, the table, else a search by a dummy forward.

    Args:
        model: any vision model.

    Returns:
        Taps, in the syntax of `Taps`.

    Raises:
        InputError: if the search finds nothing that looks like a map.
    """
    from transformers import PreTrainedModel
    from transformers.backbone_utils import BackboneMixin

    if isinstance(model, BackboneMixin):
        return ["."]
    if isinstance(model, PreTrainedModel):
        config = model.config.to_dict()
        # A pooling or ASPP head reads the last stage alone, and that is the map the paper distils.
        if config["model_type"] == "cankd_fpn" and config.get("head") in ("psp", "aspp"):
            return ["backbone:-1"]
        known = AUTO_TAPS.get(config["model_type"], ())
        # The table is about models with their dense head: of a SegformerModel alone it names what is not there.
        if known and all(_exists(model, tap) for tap in known):
            return list(known)
    return discover_taps(model)


def resolve_path(model: nn.Module, tap: str) -> list[str]:
    """Expands a tap's `*` and `-1` and checks that its modules exist.

    Args:
        model: the model the path starts at.
        tap: "module.path", without ":KEY"; "." is the model itself.

    Returns:
        Names that `model.get_submodule` takes ("" for ".").

    Raises:
        InputError: naming the part that does not exist and the nearest names that do.
    """
    if tap == ".":
        return [""]
    found = [""]
    for part in tap.split("."):
        found = [_join(path, name) for path in found for name in _children(model, path, part, tap)]
    return found


def discover_taps(model: nn.Module, image_size: int | None = None) -> list[str]:
    """Searches a model nobody described: the last map of each stride from 4 to 32, else its last tokens.

    Args:
        model: called with one made-up image, in eval, without gradient.
        image_size: side of that image; by default the configuration's, else 128.

    Returns:
        Module paths, fine to coarse.

    Raises:
        InputError: if no module returns anything like a map.
    """
    side = image_size or _config_value(model, "image_size") or 128
    size = (side, side)
    num_labels = _config_value(model, "num_labels")
    maps: dict[int, str] = {}
    tokens: list[str] = []

    def record(path: str, output: Any) -> None:
        if not isinstance(output, Tensor) or output.ndim not in (3, 4):
            return
        try:
            found = to_maps(output, size)[0]
        except InputError:
            return
        if output.ndim == 3:
            tokens.append(path)
            return
        stride = round(log2(side / max(found.shape[-2], 1)), 1)
        logits = found.shape[1] in (num_labels, 1, 3)
        if 2 <= round(stride) <= 5 and not logits:
            maps[round(stride)] = path

    named = [(name, module) for name, module in model.named_modules() if name]
    handles = [m.register_forward_hook(lambda _m, _a, out, path=name: record(path, out)) for name, m in named]
    try:
        quiet_forward(model, size)
    finally:
        for handle in handles:
            handle.remove()
    if maps:
        return [maps[stride] for stride in sorted(maps)]
    if tokens:
        return tokens[-1:]
    raise InputError(
        f"taps: expected to find maps of stride 4 to 32 in {type(model).__name__}, found none; "
        f"fix: name the modules, such as taps: [{', '.join(name for name, _ in model.named_children())}]"
    )


@torch.no_grad()
def quiet_forward(
    model: nn.Module, image_size: tuple[int, int], runner: Callable[..., Any] | None = None, **kwargs: Any
) -> Any:
    """One forward of a made-up image that leaves no trace: in eval, no random numbers used up.

    Args:
        model: called with `pixel_values [1, 3, H, W]` in its own dtype and on its own device.
        image_size: height and width.
        runner: called instead of the model itself, with the same arguments.
        **kwargs: passed on.

    Returns:
        What the model returns.
    """
    training = [module for module in model.modules() if module.training]
    parameter = next(model.parameters(), torch.zeros(()))
    # A ramp: of zeros a fresh model without biases would make zeros everywhere, and hide what differs.
    ramp = torch.linspace(-1, 1, 3 * image_size[0] * image_size[1]).view(1, 3, *image_size)
    pixels = ramp.to(parameter.device, parameter.dtype)
    devices = [parameter.device] if parameter.device.type == "cuda" else []
    model.eval()
    try:
        with torch.random.fork_rng(devices), torch.autocast(parameter.device.type, enabled=False):
            return (runner or model)(pixels, **kwargs)
    finally:
        for module in training:  # one by one: a part frozen in eval stays so
            module.training = True


def token_patch_size(model: nn.Module) -> int | None:
    """Pixels per token as the configuration states it, if it does (also inside a backbone's configuration)."""
    return _config_value(model, "patch_size")


def trailing_tokens(model: nn.Module) -> int:
    """How many tokens that stand for no patch come after the patches (YOLOS puts its queries there)."""
    return _config_value(model, "num_detection_tokens") or 0


def _config_value(model: nn.Module, key: str) -> int | None:
    """A whole number of a Hugging Face configuration, or of the backbone's configuration inside it."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return None
    config = model.config.to_dict()
    for part in (config, config.get("backbone_config") or {}, config.get("vision_config") or {}):
        value = part.get(key)
        if isinstance(value, (list, tuple)) and value:
            value = value[0]
        if isinstance(value, int):
            return value
    return model.config.num_labels if key == "num_labels" else None


def _exists(model: nn.Module, tap: str) -> bool:
    try:
        resolve_path(model, tap.partition(":")[0])
    except InputError:
        return False
    return True


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _children(model: nn.Module, path: str, part: str, tap: str) -> list[str]:
    names = [name for name, _ in model.get_submodule(path).named_children()]
    if part == "*" and names:
        return names
    if part.startswith("-") and part[1:].isdigit() and int(part[1:]) <= len(names):
        return [names[int(part)]]
    if part in names:
        return [part]
    everything = [name for name, _ in model.named_modules() if name]
    near = difflib.get_close_matches(tap, everything, n=3, cutoff=0.4)
    raise InputError(
        f"taps: expected a module path of {type(model).__name__}, got {tap!r}: there is no {part!r} in "
        f"{path or 'the model'}, only {', '.join(names[:12]) or 'nothing'}{' ...' if len(names) > 12 else ''}"
        + (f"; did you mean {' or '.join(near)}?" if near else "")
    )
