"""Model configurations from recipe data, with checks that `transformers` does not make."""

import difflib
import inspect
from collections.abc import Iterable
from typing import Any, cast

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneConfigMixin
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from cankd_hf.errors import InputError, Problem

# Accepted by every configuration, though not all of them list it among their own fields.
COMMON_KEYS = {
    *("model_type", "num_labels", "id2label", "label2id", "out_indices", "out_features", "attn_implementation")
}


def config_from_dict(values: dict[str, Any], place: str) -> PretrainedConfig:
    """A configuration (hence random weights) from a dictionary like `{"model_type": "resnet", "depths": [1, 1, 1,
    1]}`.

    `place` is the dictionary's path in the recipe, e.g. `student.config`. Raises InputError for a missing or unknown
    `model_type`, an unknown key (with the nearest one) or a bad value.
    """
    if "model_type" not in values:
        raise InputError([Problem(place, f"expected a key model_type (e.g. resnet), got {sorted(values)}; add it")])
    model_type = values["model_type"]
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        near = nearest(str(model_type), CONFIG_MAPPING.keys())
        raise InputError(
            [Problem(f"{place}.model_type", f"expected a model type of transformers, got {model_type!r}{near}")]
        )
    check_keys(values, AutoConfig.for_model(model_type), place)
    for key, inner in values.items():
        if isinstance(inner, dict) and "model_type" in inner:
            config_from_dict(inner, f"{place}.{key}")  # transformers stores an inner model's unknown keys as well
    try:
        return AutoConfig.for_model(**values)
    # Whatever their kind: configurations compare and index values without looking at their types.
    except Exception as error:
        if isinstance(error, InputError):
            raise
        kind = "" if isinstance(error, ValueError | StrictDataclassError) else f"{type(error).__name__}: "
        message = f"{model_type} cannot be configured: {kind}{' '.join(str(error).split())}"
        raise InputError([Problem(place, message)]) from error


def from_config(auto_class: Any, config: PretrainedConfig) -> PreTrainedModel:
    """`auto_class.from_config`, also for a model type with several classes (DeiT), for which that of transformers 5.24
    iterates over `config.architectures` of None."""
    if config.architectures is None:
        config.architectures = []
    return cast(PreTrainedModel, auto_class.from_config(config))


def check_keys(values: Iterable[str], config: PretrainedConfig, place: str) -> None:
    """Refuses keys that are not fields of the configuration, which `transformers` would silently store. Raises
    InputError with one line per unknown key and the nearest known one."""
    # Not every setting is stored: a pyramid's configuration leaves out those of the tasks it is not for.
    settings = set(inspect.signature(type(config).__init__).parameters) - {"self", "kwargs"}
    known = set(config.to_dict()) | set(config.attribute_map) | settings | COMMON_KEYS
    if isinstance(config, BackboneConfigMixin):
        known.add("stage_names")  # a timm model writes those it has into its configuration, which is saved with them
    unknown = [str(key) for key in values if key not in known]
    if unknown:
        raise InputError(
            [Problem(f"{place}.{key}", f"no such key for {config.model_type}{nearest(key, known)}") for key in unknown]
        )


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?`, or nothing if no known word is similar."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
