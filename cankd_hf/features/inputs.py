"""The image size and normalisation that a pretrained model expects."""

import json
from dataclasses import dataclass
from math import floor, sqrt
from pathlib import Path
from typing import Any

from torch import nn

from cankd_hf.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Models that cut the image into patches and drop what is left over at its right and bottom edge.
PATCHED = {
    *("beit", "clip_vision_model", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "dpt"),
    *("lw_detr_vit", "pixio", "rf_detr_dinov2", "sapiens2", "siglip_vision_model", "tipsv2"),
    *("tipsv2_vision_model", "vit", "vit_mae", "vit_msn", "vitdet", "yolos"),
}
# Of these, those with windowed attention, with `num_windows` windows along a side (or in all, see `input_rule`).
_WINDOWED = {"rf_detr_dinov2", "lw_detr_vit"}
# Detectors whose neck adds maps of neighbouring strides, upsampled by 2: they fail where these do not match.
_ADDING_NECKS = {"rt_detr", "rt_detr_v2", "d_fine", "deimv2", "omdet-turbo"}
# Models that take images of one size only.
FIXED_SIZE = {"data2vec-vision", "eomt", "eomt_dinov3", "hiera", "vitpose_backbone"}


@dataclass(frozen=True)
class InputRule:
    """The image sizes that a model takes without cutting anything off."""

    multiple: int = 1  # height and width must be multiples of this
    fixed: tuple[int, int] | None = None  # the only size it takes, if there is one
    square: bool = False  # whether it takes only square images (others are stretched to the square of equal area)
    strict: bool = False  # whether other sizes raise an error, rather than having their edges cut off

    def size(self, image_size: tuple[int, int], scale: float = 1.0) -> tuple[int, int]:
        """The height and width to resize an image to, enlarged by `scale`: the nearest multiples, at least one."""
        if self.fixed is not None:
            return self.fixed
        if self.square:
            image_size = (round(sqrt(image_size[0] * image_size[1])),) * 2
        height, width = (max(1, floor(side * scale / self.multiple + 0.5)) * self.multiple for side in image_size)
        return height, width

    @property
    def pads_to(self) -> int:
        """What the sides of a batch are padded to a multiple of."""
        if self.fixed is not None and self.fixed[0] == self.fixed[1]:
            return self.fixed[0]
        return self.multiple if self.strict else 1


def input_rule(model: nn.Module) -> InputRule:
    """Reads a model's rule from its configuration or its backbone's; modules without one take any size."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return InputRule()
    config = model.config.to_dict()
    for part in (config, config.get("backbone_config") or {}, config.get("vision_config") or {}):
        kind = part.get("model_type")
        if kind in FIXED_SIZE:
            return InputRule(fixed=_pair(part["image_size"]))
        if kind == "timm_backbone":
            return _timm_rule(part["backbone"])
        if kind in PATCHED:
            patch = _pair(part["patch_size"])[0]
            if kind == "dpt" and part.get("backbone_config"):
                continue  # the inner backbone cuts the patches
            windows = part["num_windows"] if kind in _WINDOWED else 1
            if kind == "lw_detr_vit":  # counts the windows of both sides
                windows = round(windows**0.5)
            return InputRule(patch * windows, square=kind == "dpt", strict=kind in _WINDOWED)
        if kind in _ADDING_NECKS:
            return InputRule(max(part.get("feat_strides") or [32]), strict=True)
    return InputRule()


@dataclass(frozen=True)
class ImageStats:
    """Mean and standard deviation of red, green and blue that a model's images (in 0..1) are normalised with.

    `source` says where they come from, for the record.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    source: str = "ImageNet (the model names none)"


def image_stats(name: str, revision: str | None = None) -> ImageStats:
    """Finds the statistics of a local folder, a Hub id (also offline, from the cache) or `timm/NAME`. Returns those of
    `preprocessor_config.json`, or of timm's pretrained configuration, else ImageNet's."""
    if name.startswith("timm/"):
        return timm_stats(name.removeprefix("timm/"))
    from transformers.utils import cached_file

    for file, section in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        path = cached_file(
            name,
            file,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        if path is not None:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            found = _from_processor(values if section is None else values.get(section) or {}, file)
            if found is not None:
                return found
    return ImageStats()


def is_timm_name(name: str) -> bool:
    """Whether a name is a timm model: `timm/NAME`, or a bare name that timm knows and that is not a local folder."""
    if name.startswith("timm/") or not name or "/" in name or Path(name).is_dir():
        return name.startswith("timm/")
    import timm

    return bool(timm.is_model(name))


def timm_stats(name: str) -> ImageStats:
    """Statistics of timm's pretrained configuration; ImageNet's for a name that has none."""
    import timm

    config = timm.get_pretrained_cfg(name)
    if config is None:
        return ImageStats()
    return ImageStats(tuple(config.mean), tuple(config.std), f"timm's configuration of {name}")


def timm_folder_stats(folder: str) -> ImageStats:
    """Statistics in the `config.json` of a folder with timm's files, as timm's repositories on the Hub have one."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("pretrained_cfg") or {}
    if not (config.get("mean") and config.get("std")):
        return ImageStats()
    return ImageStats(tuple(config["mean"]), tuple(config["std"]), f"timm's configuration in {folder}")


def timm_stages(name: str) -> list[int]:
    """The `out_indices` to take of a timm model: the last map of each stride from 4 on; of a plain ViT its last."""
    import timm
    import torch

    try:
        with torch.device("meta"):  # shapes only
            features: Any = timm.create_model(name, pretrained=False, features_only=True)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"timm/{name}: expected a model with feature maps that timm has, got none: {error}") from None
    last = {info["reduction"]: index for index, info in enumerate(features.feature_info.info)}
    return sorted(index for stride, index in last.items() if stride >= 4)


def _timm_rule(name: str) -> InputRule:
    import timm

    config = timm.get_pretrained_cfg(name)
    if config is None or not config.fixed_input_size:
        return InputRule()
    return InputRule(fixed=(config.input_size[-2], config.input_size[-1]))


def _from_processor(values: dict[str, Any], file: str) -> ImageStats | None:
    if values.get("do_normalize") is False:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    elif "image_mean" in values and "image_std" in values:
        mean, std = tuple(values["image_mean"]), tuple(values["image_std"])
    else:
        return None
    # Processors rescale bytes by this factor; ours start from 0..1.
    unit = 255 * values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 255.0
    return ImageStats(tuple(m / unit for m in mean), tuple(s / unit for s in std), file)


def _pair(value: Any) -> tuple[int, int]:
    return (value[-2], value[-1]) if isinstance(value, (list, tuple)) else (value, value)
