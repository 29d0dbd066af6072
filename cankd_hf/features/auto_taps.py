"""Where the maps of a model are: a table of known models, and a search for the others."""

import difflib
from collections.abc import Callable
from math import log2
from typing import Any

import torch
from torch import Tensor, nn

from cankd_hf.errors import InputError
from cankd_hf.features.grids import to_maps

# model_type -> taps, in any order. Necks rather than heads: a student's head can use what another head reads.
AUTO_TAPS: dict[str, tuple[str, ...]] = {
    # semantic and universal segmentation
    "segformer": ("decode_head.linear_projections.*",),
    "upernet": ("decode_head.fpn_convs.*", "decode_head.bottleneck"),
    **dict.fromkeys(("beit", "data2vec-vision"), ("decode_head.fpn_convs.*", "decode_head.psp_bottleneck")),
    "dpt": ("neck",),
    "mobilenet_v2": ("segmentation_head.conv_projection",),
    **dict.fromkeys(("mobilevit", "mobilevitv2"), ("segmentation_head.aspp",)),
    "maskformer": ("model.pixel_level_module.decoder.fpn",),
    **dict.fromkeys(
        ("mask2former", "oneformer"),
        tuple(f"model.pixel_level_module.decoder:{key}" for key in ("mask_features", "multi_scale_features")),
    ),
    **dict.fromkeys(("eomt", "eomt_dinov3"), ("layers.-1",)),
    # depth
    "depth_anything": ("neck",),
    "glpn": ("decoder",),
    # detection
    **dict.fromkeys(("rt_detr", "rt_detr_v2", "d_fine"), ("model.encoder:last_hidden_state",)),
    "deimv2": ("model.encoder",),
    "deformable_detr": ("model.input_proj.*",),
    **dict.fromkeys(("detr", "table-transformer", "conditional_detr", "dab-detr"), ("model.input_projection",)),
    "yolos": ("vit.layernorm",),
    **dict.fromkeys(("rf_detr", "lw_detr"), ("model.backbone.projector",)),
    # zero-shot detection: the image's maps before they meet the text
    **dict.fromkeys(("grounding-dino", "mm-grounding-dino"), ("model.input_proj_vision.*",)),
    "omdet-turbo": ("encoder:extracted_states",),
    # plain ViTs, which have no Backbone class: the normalised tokens of the last block
    **dict.fromkeys(("vit", "vit_msn", "deit"), ("layernorm",)),
    **dict.fromkeys(("siglip_vision_model", "siglip2_vision_model"), ("post_layernorm",)),
    "clip_vision_model": ("encoder.layers.-1",),
    # ours
    "cankd_fpn": ("neck",),
    "cankd_dino": ("model.encoder_maps",),
}
# Where models for instance segmentation keep the detector that they are built on.
DETECTORS = ("", "detr.", "model.")


def auto_taps(model: nn.Module) -> list[str]:
    """Finds a model's taps, in the syntax of `Taps`: its own feature maps if it is a backbone, the table, else a
    search. Raises InputError if the search finds nothing that looks like a feature map."""
    from transformers import PreTrainedModel
    from transformers.backbone_utils import BackboneMixin

    if isinstance(model, BackboneMixin):
        return ["."]
    if isinstance(model, PreTrainedModel):
        config = model.config.to_dict()
        # A pooling or ASPP head reads only the last stage, and that is the map the paper distils.
        if config["model_type"] == "cankd_fpn" and config.get("head") in ("psp", "aspp"):
            return ["backbone:-1"]
        known = AUTO_TAPS.get(config["model_type"], ())
        # The table describes models with their dense head: a bare SegformerModel lacks the modules it names.
        for within in DETECTORS if known else ():
            if all(_exists(model, within + tap) for tap in known):
                return [within + tap for tap in known]
    return discover_taps(model)


def resolve_path(model: nn.Module, tap: str) -> list[str]:
    """Expands the `*` and `-1` of a module path ("." is the model) into names that `model.get_submodule` takes. Raises
    InputError naming the part that does not exist and the nearest names that do."""
    if tap == ".":
        return [""]
    found = [""]
    for part in tap.split("."):
        found = [_join(path, name) for path in found for name in _children(model, path, part, tap)]
    return found


def discover_taps(model: nn.Module, image_size: int | None = None) -> list[str]:
    """Searches a model for taps, fine to coarse: the last map of each stride from 4 to 32, else its last tokens.

    The model is run on one synthetic image of side `image_size` (by default the configuration's, else 128). Raises
    InputError if no module returns anything like a feature map.
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
    """Runs one synthetic image `[1, 3, H, W]` through a model in eval mode; its mode and the random state do not
    change.

    `runner` is called instead of the model, with the same arguments, in the model's own dtype and on its device.
    """
    training = [module for module in model.modules() if module.training]
    parameter = next(model.parameters(), torch.zeros(()))
    # A ramp: from zeros a fresh model without biases would make zeros everywhere, and hide differences.
    ramp = torch.linspace(-1, 1, 3 * image_size[0] * image_size[1]).view(1, 3, *image_size)
    pixels = ramp.to(parameter.device, parameter.dtype)
    devices = [parameter.device] if parameter.device.type == "cuda" else []
    model.eval()
    try:
        with torch.random.fork_rng(devices), torch.autocast(parameter.device.type, enabled=False):
            return (runner or model)(pixels, **kwargs)
    finally:
        for module in training:  # one by one: a part frozen in eval mode stays so
            module.training = True


def token_patch_size(model: nn.Module) -> int | None:
    """Pixels per token according to the configuration, or to the backbone's configuration inside it."""
    return _config_value(model, "patch_size")


def trailing_tokens(model: nn.Module) -> int:
    """Number of tokens after the patches that belong to no patch (YOLOS puts its queries there)."""
    return _config_value(model, "num_detection_tokens") or 0


def _config_value(model: nn.Module, key: str) -> int | None:
    """An integer of a Hugging Face configuration, or of the backbone's configuration inside it."""
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
