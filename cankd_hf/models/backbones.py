"""Backbones by id, folder, timm name or configuration, online and offline.

`AutoBackbone.from_pretrained` first asks the Hub whether the repository exists, so it loads neither local folders nor
offline; the concrete class, found through the same mapping, does both.
"""

import copy
import json
import logging
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoBackbone, AutoConfig, PretrainedConfig, PreTrainedModel, TimmBackboneConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

from cankd_hf.config.named import hint
from cankd_hf.errors import InputError
from cankd_hf.models.configs import check_keys, config_from_dict
from cankd_hf.models.fpn.configuration_cankd_fpn import FPNConfig
from cankd_hf.models.unreadable import NOT_LOADED, NotFetched, not_loaded

logger = logging.getLogger(__name__)

# Norms of Backbone classes that the plain models lack: absent in most checkpoints, initialised as the identity.
LOCAL = "local-dir:"  # what timm calls a folder with its files
ADDED_NORMS = re.compile(r"(^|\.)hidden_states_norms\.")


def load_backbone(
    source: str | Path | dict[str, Any],
    *,
    out_indices: list[int] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Any backbone of `transformers` or timm, whose forward returns `.feature_maps`.

    Args:
        source: a local folder (of transformers or timm; of a pyramid model its backbone is taken); a Hub id;
            `timm/NAME` or a bare timm name (pretrained weights of timm); or a dictionary: a configuration with
            `model_type` (random weights), or `{"pretrained": SOURCE, ...}` with configuration fields to override, such
            as `output_stride: 8` for timm.
        out_indices: stages to return maps of; default: the source's own, usually only the last.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: whether code of the repository may run.
        dtype: of the weights; default float32, whatever the checkpoint holds.

    Returns:
        The `XxxBackbone`, in eval mode when loaded and in train mode when built from a configuration.

    Raises:
        InputError: if it is not found, is not a backbone, or its weights are incomplete (the missing keys are listed).
    """
    name, overrides = _split(source)
    if name is None:
        return random_backbone(overrides, out_indices, dtype)
    if out_indices is not None:
        overrides["out_indices"] = out_indices
        overrides.pop("out_features", None)
    if (from_timm := timm_source(name)) is not None:
        return _timm_backbone(*from_timm, overrides, dtype)
    hub = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = _overridden(name, overrides, hub)
    cls = _backbone_class(config, name, hub)
    loader: Callable[..., Any] = cls.from_pretrained
    if isinstance(config, TimmBackboneConfig):  # its own from_pretrained takes a folder for a timm name
        loader = partial(PreTrainedModel.from_pretrained.__func__, cls)  # type: ignore[attr-defined]
    # Mismatched shapes are allowed here, to be listed with the missing keys below.
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True, "revision": revision or "main"}
    options["key_mapping"] = {r"^backbone\.": ""}  # of a pyramid model
    try:
        model, info = loader(name, config=config, dtype=dtype or torch.float32, **options)
    except NOT_LOADED as error:
        raise not_loaded(f"backbone {name}: cannot be loaded: {first_line(error)}", name) from error
    check_complete(f"backbone {name}", info["missing_keys"], (entry[0] for entry in info["mismatched_keys"]))
    return model


def backbone_config(
    source: str | Path | dict[str, Any], *, revision: str | None = None, trust_remote_code: bool = False
) -> PretrainedConfig:
    """The configuration that `load_backbone` would use, without loading weights.

    Where the source does not name the stages it requests only the last one, even for a saved backbone with others.
    Raises InputError as `load_backbone` does.
    """
    name, overrides = _split(source)
    from_timm = None if name is None else timm_source(name)
    if name is None:
        config = config_from_dict(overrides, "backbone")
    elif from_timm is not None:
        config = _timm_config(from_timm[0], overrides)
    else:
        config = _overridden(name, overrides, {"revision": revision, "trust_remote_code": trust_remote_code})
    _check_backbone("backbone" if name is None else f"backbone {name}", config)
    if name is not None and not {"out_indices", "out_features"} & set(overrides):
        config.out_indices = [-1 if config.model_type == "timm_backbone" else len(config.stage_names) - 1]
    return config


def _split(source: str | Path | dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """The weights' source (None: random) and the configuration fields beside it."""
    if not isinstance(source, dict):
        return str(source), {}
    fields = dict(source)
    name = fields.pop("pretrained", None)
    return None if name is None else str(name), fields


def _overridden(name: str, overrides: dict[str, Any], hub: dict[str, Any]) -> PretrainedConfig:
    config = load_config(name, hub)
    inner = config.backbone_config if isinstance(config, FPNConfig) else None
    check_keys(overrides, inner or config, f"backbone {name}")
    try:
        if inner is None:
            return AutoConfig.from_pretrained(name, **hub, **overrides) if overrides else config
        for key, value in overrides.items():
            setattr(inner, key, value)
        return inner
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise InputError(f"backbone {name}: cannot be configured: {' '.join(str(error).split())}") from error


def random_backbone(
    values: dict[str, Any], out_indices: list[int] | None = None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A backbone with random weights from the fields of its configuration. Raises InputError for a bad configuration,
    or a model type without a Backbone class."""
    values = dict(values) if out_indices is None else {**values, "out_indices": out_indices}
    config = config_from_dict(values, "backbone")
    _check_backbone("backbone", config)
    try:
        model = AutoBackbone.from_config(copy.deepcopy(config))
    except (ValueError, RuntimeError, KeyError, IndexError) as error:
        raise InputError(f"backbone: {config.model_type} cannot be built: {first_line(error)}") from error
    return model if dtype is None else model.to(dtype)


def load_config(name: str, hub: dict[str, Any]) -> PretrainedConfig:
    """The configuration of a folder or Hub id. Raises InputError if there is none, or its model type is unknown."""
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise InputError(f"{name}: expected a model folder with a config.json, found none; name the model's folder")
    try:
        return AutoConfig.from_pretrained(name, **hub)
    except (OSError, ValueError) as error:
        said = (
            f"{name}: expected a local folder with a config.json or a model id on the Hub, got neither "
            f"({first_line(error)}); check the spelling, or the network{hint(name)}"
        )
        raise not_loaded(said, name) from error


def _check_backbone(place: str, config: PretrainedConfig) -> None:
    if type(config) not in MODEL_FOR_BACKBONE_MAPPING:
        raise InputError(
            f"{place}: expected a model type with a Backbone class (resnet, convnext, swin, dinov2, timm_backbone, "
            f"...), got {config.model_type!r}; use one of those, or a timm name"
        )


def _backbone_class(config: PretrainedConfig, name: str, hub: dict[str, Any]) -> type[PreTrainedModel]:
    auto_map = config.to_dict().get("auto_map") or {}
    if hub["trust_remote_code"] and "AutoBackbone" in auto_map:
        return get_class_from_dynamic_module(auto_map["AutoBackbone"], name, revision=hub["revision"])
    _check_backbone(f"backbone {name}", config)
    return cast(type[PreTrainedModel], MODEL_FOR_BACKBONE_MAPPING[type(config)])


def check_complete(place: str, missing: Iterable[str], mismatched: Iterable[str] = ()) -> None:
    """Refuses a model with parameters that were not loaded; norms added by a Backbone class are allowed, and logged.
    Raises InputError listing the keys."""
    absent = sorted({*missing, *mismatched})
    added = [key for key in absent if ADDED_NORMS.search(key)]
    absent = [key for key in absent if key not in added]
    if absent:
        listed = ", ".join(absent[:10]) + (f" and {len(absent) - 10} more" if len(absent) > 10 else "")
        raise InputError(
            f"{place}: expected weights for every parameter, but {len(absent)} are missing or of another "
            f"shape: {listed}; is it the right folder and revision?"
        )
    if added:
        logger.info("%s: %d parameters of norms that the Backbone class adds start as the identity", place, len(added))


def timm_source(name: str) -> tuple[str, str] | None:
    """Architecture and weights of timm's models: `timm/NAME`, a bare timm name, or a folder that timm wrote (its
    `config.json` has a key `architecture`)."""
    if Path(name).is_dir():
        file = Path(name) / "config.json"
        architecture = json.loads(file.read_text(encoding="utf-8")).get("architecture") if file.is_file() else None
        return None if architecture is None else (architecture, f"{LOCAL}{name}")
    if name.startswith("timm/"):
        return name.removeprefix("timm/"), name.removeprefix("timm/")
    if "/" in name:
        return None
    try:
        import timm
    except ImportError:
        return None
    return (name, name) if timm.is_model(name) else None


def _timm_config(name: str, overrides: dict[str, Any]) -> TimmBackboneConfig:
    check_keys(overrides, TimmBackboneConfig(backbone=name), f"backbone timm/{name}")
    try:
        return TimmBackboneConfig(**{"backbone": name, "out_indices": [-1], **overrides})
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise InputError(f"backbone timm/{name}: cannot be configured: {' '.join(str(error).split())}") from error


def _timm_backbone(name: str, address: str, overrides: dict[str, Any], dtype: torch.dtype | None) -> PreTrainedModel:
    """A timm backbone with timm's pretrained weights, which are copied from timm's own model.

    `TimmBackbone(pretrained=True)` of transformers 5.23 resets the running statistics of every BatchNorm after
    loading.
    """
    import timm
    from transformers import TimmBackbone  # imports timm, which takes a third of a second

    config = _timm_config(name, overrides)
    try:
        model = TimmBackbone(config)
        pretrained = timm.create_model(
            address,
            pretrained=True,
            features_only=config.features_only,
            out_indices=tuple(config.out_indices),
            output_stride=config.output_stride,
        )
    except NOT_LOADED as error:
        said = f"backbone timm/{name}: its pretrained weights cannot be loaded ({first_line(error)}); check "
        if address.startswith(LOCAL):
            raise InputError(f"{said}the files in {address.removeprefix(LOCAL)}") from error
        raise NotFetched(f"{said}the name (timm.list_pretrained()) and the network", name) from error
    model._backbone.load_state_dict(pretrained.state_dict())
    return model.eval() if dtype is None else model.eval().to(dtype)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
