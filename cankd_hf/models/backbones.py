"""Backbones by id, folder, timm name or configuration, online and offline.

`AutoBackbone.from_pretrained` asks the Hub whether the repository exists before anything else, so it loads no local folder
and nothing offline; the concrete class, found through the same mapping, does both.
"""

from __future__ import annotations

import copy
import logging
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoBackbone, AutoConfig, PretrainedConfig, PreTrainedModel, TimmBackbone, TimmBackboneConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

from cankd_hf.errors import InputError
from cankd_hf.models.configs import check_keys, config_from_dict

logger = logging.getLogger(__name__)

# Norms that a Backbone class has and the plain model has not: absent in most checkpoints, the identity's scale when fresh.
ADDED_NORMS = re.compile(r"(^|\.)hidden_states_norms\.")


def load_backbone(
    source: str | Path | dict[str, Any],
    *,
    out_indices: list[int] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Any backbone of `transformers` or timm, whose forward gives `.feature_maps`.

    Args:
        source: a local folder; a Hub id; `timm/NAME` or a bare timm name (pretrained weights of timm); or a dictionary: a
            configuration with `model_type` (random weights), or `{"pretrained": SOURCE, ...}` with configuration fields to
            override, such as `output_stride: 8` for timm.
        out_indices: stages whose maps are wanted; default: what the source says, usually the last alone.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: whether code of the repository may run.
        dtype: of the weights; default float32, whatever the checkpoint holds.

    Returns:
        The `XxxBackbone`, in eval mode when loaded and in train mode when built from a configuration.

    Raises:
        InputError: if it is not found, is no backbone, or its weights are incomplete (the missing keys are listed).
    """
    overrides: dict[str, Any] = {}
    if isinstance(source, dict):
        overrides = dict(source)
        pretrained = overrides.pop("pretrained", None)
        if pretrained is None:
            return random_backbone(overrides, out_indices, dtype)
        source = pretrained
    if out_indices is not None:
        overrides["out_indices"] = out_indices
    name = str(source)
    if not Path(name).is_dir() and (name.startswith("timm/") or "/" not in name and _is_timm_name(name)):
        return _timm_backbone(name.removeprefix("timm/"), overrides, dtype)
    hub = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = load_config(name, hub)
    check_keys(overrides, config, f"backbone {name}")
    try:
        config = AutoConfig.from_pretrained(name, **hub, **overrides)
        cls = _backbone_class(config, name, hub)
        if issubclass(cls, TimmBackbone):  # its own from_pretrained takes a folder for a timm name
            model, info = PreTrainedModel.from_pretrained.__func__(  # type: ignore[attr-defined]
                cls, name, config=config, dtype=dtype or torch.float32, output_loading_info=True, revision=revision
            )
        else:
            model, info = cls.from_pretrained(
                name, config=config, dtype=dtype or torch.float32, output_loading_info=True, revision=revision
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"backbone {name}: cannot be loaded: {_first_line(error)}") from error
    _check_complete(name, info)
    return model


def random_backbone(
    values: dict[str, Any], out_indices: list[int] | None = None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A backbone with random weights from the fields of its configuration.

    Raises:
        InputError: for a bad configuration, or a model type without a Backbone class.
    """
    values = dict(values) if out_indices is None else {**values, "out_indices": out_indices}
    config = config_from_dict(values, "backbone")
    if type(config) not in MODEL_FOR_BACKBONE_MAPPING:
        raise InputError(no_backbone("backbone", config))
    try:
        model = AutoBackbone.from_config(copy.deepcopy(config))
    except (ValueError, RuntimeError, KeyError, IndexError) as error:
        raise InputError(f"backbone: {config.model_type} cannot be built so: {_first_line(error)}") from error
    return model if dtype is None else model.to(dtype)


def load_config(name: str, hub: dict[str, Any]) -> PretrainedConfig:
    """The configuration of a folder or Hub id.

    Raises:
        InputError: if there is none, or its model type is unknown.
    """
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise InputError(f"{name}: expected a model folder with a config.json, found none; name the checkpoint's own folder")
    try:
        return AutoConfig.from_pretrained(name, **hub)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{name}: expected a local folder with a config.json or a model id on the Hub, got neither ({_first_line(error)}); "
            "check the spelling, or the network"
        ) from error


def no_backbone(place: str, config: PretrainedConfig) -> str:
    """The message for a model type without a Backbone class."""
    return (
        f"{place}: expected a model type with a Backbone class (resnet, convnext, swin, dinov2, timm_backbone, ...), "
        f"got {config.model_type!r}; use one of those, or a timm name"
    )


def _backbone_class(config: PretrainedConfig, name: str, hub: dict[str, Any]) -> type[PreTrainedModel]:
    auto_map = config.to_dict().get("auto_map") or {}
    if hub["trust_remote_code"] and "AutoBackbone" in auto_map:
        return get_class_from_dynamic_module(auto_map["AutoBackbone"], name, revision=hub["revision"])
    if type(config) not in MODEL_FOR_BACKBONE_MAPPING:
        raise InputError(no_backbone(f"backbone {name}", config))
    return MODEL_FOR_BACKBONE_MAPPING[type(config)]


def _check_complete(name: str, info: dict[str, Any]) -> None:
    """Refuses a model part of which kept its random start."""
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    added = [key for key in missing if ADDED_NORMS.search(key)]
    missing = [key for key in missing if key not in added]
    if missing:
        listed = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        raise InputError(
            f"backbone {name}: expected weights for every parameter, but {len(missing)} are missing or of another shape: "
            f"{listed}; is it the right folder and revision?"
        )
    if added:
        logger.info("%s: %d parameters of norms that the Backbone class adds start as the identity", name, len(added))


def _is_timm_name(name: str) -> bool:
    try:
        import timm
    except ImportError:
        return False
    return timm.is_model(name)


def _timm_backbone(name: str, overrides: dict[str, Any], dtype: torch.dtype | None) -> PreTrainedModel:
    """A timm backbone with timm's pretrained weights."""
    config = TimmBackboneConfig(backbone=name)
    check_keys(overrides, config, f"backbone timm/{name}")
    config = TimmBackboneConfig(**{"backbone": name, "out_indices": [-1], **overrides})
    try:
        model = TimmBackbone(config, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"backbone timm/{name}: its pretrained weights cannot be loaded ({_first_line(error)}); check the name "
            "(timm.list_pretrained()) and the network, or give a configuration with model_type: timm_backbone"
        ) from error
    return model.eval() if dtype is None else model.eval().to(dtype)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
