"""Pretrained models that are not backbones: dense-prediction models with their heads, and plain ViTs."""

import os
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from cankd_hf.errors import InputError
from cankd_hf.models.backbones import check_complete
from cankd_hf.models.configs import from_config
from cankd_hf.models.fpn.configuration_cankd_fpn import CLASSIFICATION_HEADS, DEPTH_HEADS, DETECTION_HEADS, FPNConfig
from cankd_hf.models.unreadable import NOT_LOADED, not_loaded

# Class name endings of dense-prediction models, whose auto classes are `AutoModel` and the ending.
_DENSE = (
    *("ForSemanticSegmentation", "ForUniversalSegmentation", "ForInstanceSegmentation"),
    *("ForObjectDetection", "ForDepthEstimation"),
)
# The auto class of a pyramid model by its head, where that is not segmentation.
_BY_HEAD = {
    **dict.fromkeys(DETECTION_HEADS, "AutoModelForObjectDetection"),
    **dict.fromkeys(DEPTH_HEADS, "AutoModelForDepthEstimation"),
    **dict.fromkeys(CLASSIFICATION_HEADS, "AutoModelForImageClassification"),
}
# Class names of zero-shot detectors end like those of other detectors.
_ZERO_SHOT = "AutoModelForZeroShotObjectDetection"
# Two-tower models: their vision tower.
_VISION_TOWERS = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}
# Weights of a plain ViT that may be missing because no map depends on them.
_UNREAD = re.compile(r"(^|\.)(pooler|head)\.|(^|\.)mask_token$")


def dense_or_plain_class(config: PretrainedConfig, head: str | None = None) -> str | None:
    """The auto class that loads a model that is not a backbone; None for a backbone. `head` is the auto class of a
    task, which goes before a backbone where the checkpoint, or a bare configuration, has it.

    A checkpoint's architecture decides; a bare configuration means a backbone if there is one, else the model with a
    dense-prediction head, else (a plain ViT) `AutoModel`.
    """
    architecture = (config.architectures or [""])[0]
    known = head is not None and type(config) in getattr(transformers, head)._model_mapping
    if known and (not architecture or architecture.endswith(str(head).removeprefix("AutoModel"))):
        return head
    if type(config) in getattr(transformers, _ZERO_SHOT)._model_mapping:
        return _ZERO_SHOT if not architecture or architecture.endswith("ForObjectDetection") else "AutoModel"
    for ending in _DENSE:
        if architecture.endswith(ending):
            return f"AutoModel{ending}"
    if architecture.endswith("ForSegmentation"):  # DETR's
        return "AutoModelForUniversalSegmentation"
    if type(config) in MODEL_FOR_BACKBONE_MAPPING or "AutoBackbone" in (config.to_dict().get("auto_map") or {}):
        return None
    if isinstance(config, FPNConfig) and not architecture:  # the head decides between the tasks
        usual = _BY_HEAD.get(config.head, "AutoModelForSemanticSegmentation")
        return "AutoModelForInstanceSegmentation" if getattr(config, "masks", False) else usual
    for ending in () if architecture else _DENSE:  # a bare configuration: with a dense head, if there is one
        if type(config) in getattr(transformers, f"AutoModel{ending}")._model_mapping:
            return f"AutoModel{ending}"
    return "AutoModel"


def load_dense_or_plain(
    name: str | None,
    config: PretrainedConfig,
    auto_class: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Loads a dense-prediction model with its head, or a plain ViT, in float32 and strictly.

    Without a `name` (local folder or Hub id) the weights are random; `auto_class` is from `dense_or_plain_class`.
    Raises InputError if it cannot be loaded, weights are missing (they are listed), or its input is not an image.
    """
    loader = getattr(transformers, _VISION_TOWERS.get(config.model_type, auto_class))
    tower = config.model_type in _VISION_TOWERS
    try:
        if name is None:
            model = loader(config.vision_config) if tower else from_config(loader, config)
            info: dict[str, Any] = {"missing_keys": [], "mismatched_keys": []}
        else:
            options: dict[str, Any] = {"revision": revision, "output_loading_info": True}
            if not tower:
                options["trust_remote_code"] = trust_remote_code
            model, info = loader.from_pretrained(name, dtype=torch.float32, ignore_mismatched_sizes=True, **options)
    except NOT_LOADED as error:
        reason = " ".join(str(error).split())[:500]
        called = name or config.model_type
        raise not_loaded(f"teacher {called}: cannot be loaded: {reason}", name or os.curdir) from error
    if model.main_input_name != "pixel_values":
        raise InputError(f"teacher {name or config.model_type}: expected a vision model, got {type(model).__name__}")
    missing = [key for key in info["missing_keys"] if auto_class != "AutoModel" or not _UNREAD.search(key)]
    check_complete(f"teacher {name or config.model_type}", missing, (key for key, *_ in info["mismatched_keys"]))
    return model


def hub_commit(name: str, revision: str | None = None) -> str | None:
    """The commit of a Hub id's configuration; None for a local folder."""
    if Path(name).is_dir():
        return None
    file = cached_file(
        name,
        "config.json",
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return extract_commit_hash(file, None)
