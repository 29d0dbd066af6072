"""Builds and loads students of any architecture, with weights from anywhere."""

import inspect
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForZeroShotObjectDetection, PretrainedConfig, PreTrainedModel

from cankd_hf.config.student import StudentConfig
from cankd_hf.errors import InputError
from cankd_hf.models import register
from cankd_hf.models.backbones import (
    backbone_config,
    check_complete,
    first_line,
    load_backbone,
    load_config,
    random_backbone,
)
from cankd_hf.models.configs import config_from_dict, from_config, nearest
from cankd_hf.models.fpn.configuration_cankd_fpn import FPNConfig
from cankd_hf.models.fpn.modeling_cankd_fpn import FPNForSemanticSegmentation, FPNPreTrainedModel
from cankd_hf.models.fpn.modeling_cankd_fpn_classification import FPNForImageClassification
from cankd_hf.models.fpn.modeling_cankd_fpn_depth import FPNForDepthEstimation
from cankd_hf.models.fpn.modeling_cankd_fpn_detection import FPNForObjectDetection
from cankd_hf.models.fpn.modeling_cankd_fpn_instances import FPNForInstanceSegmentation
from cankd_hf.models.native_masks import stage_problem
from cankd_hf.models.unreadable import NOT_LOADED, not_loaded

__all__ = ["StudentConfig", "build_student"]

logger = logging.getLogger(__name__)

# The class for each task's auto class.
FPN_CLASSES: dict[str, type[FPNPreTrainedModel]] = {
    "AutoModelForSemanticSegmentation": FPNForSemanticSegmentation,
    "AutoModelForObjectDetection": FPNForObjectDetection,
    "AutoModelForInstanceSegmentation": FPNForInstanceSegmentation,
    "AutoModelForDepthEstimation": FPNForDepthEstimation,
    "AutoModelForImageClassification": FPNForImageClassification,
}
# What is meant where a recipe says nothing else.
USUAL: dict[str, dict[str, Any]] = {
    "AutoModelForDepthEstimation": {"head": "depth"},
    "AutoModelForImageClassification": {"head": "linear"},
    "AutoModelForInstanceSegmentation": {"head": "faster_rcnn", "masks": True},
}
# The native models' settings for the label that their loss leaves out.
IGNORE_KEYS = ("semantic_loss_ignore_index", "loss_ignore_index")


def build_student(
    config: StudentConfig,
    auto_class: Any,
    id2label: Mapping[int, str],
    ignore_index: int | None = 255,
    fewest: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """The student with a head for these classes, in train mode and float32.

    A bare backbone is saved as its `XxxBackbone`. `load_backbone(folder)` loads every saved one, and with transformers
    5.23 so does that class for every native family (`ResNetBackbone.from_pretrained(folder)`, ...). `AutoModel` loads
    it whole only if the backbone has no norms of its own (ResNet, PVTv2, DINOv2, HGNet; not ConvNeXt and Swin);
    `AutoBackbone.from_pretrained` loads no folder. For timm no call of transformers loads one;
    `PreTrainedModel.from_pretrained.__func__(TimmBackbone, folder, config=AutoConfig.from_pretrained(folder))` works.

    Args:
        config: what to build or load.
        auto_class: the task's, e.g. `AutoModelForSemanticSegmentation`; None for a bare backbone (label-free runs).
        id2label: name of each class.
        ignore_index: label left out of the loss; None for tasks without one.
        fewest: number of classes that the head needs; None: 2 with an `ignore_index`, as the background is one,
            else 1.
        settings: further fields of the configuration, which the task decides.

    Raises:
        InputError: if it cannot be found or built, is not a model of the task, or its weights are incomplete.
    """
    config.check()
    register()
    if config.tokenizer is not None and auto_class is not AutoModelForZeroShotObjectDetection:
        raise InputError("student.tokenizer: expected a student that reads its class names, got one that does not")
    fields = dict(settings or {})
    # One class is enough for a detector, which also has the background, but not for segmentation.
    fewest = fewest if fewest is not None else 1 if ignore_index is None else 2
    if auto_class is not None and len(id2label) < fewest:
        fix = "check the data's labels" + (", where the background is a class too" if fewest > 1 else "")
        raise InputError(f"student: expected at least {fewest} classes, got {len(id2label)}; {fix}")
    if auto_class is not None and (problems := list(_contradictions(config.config or {}, id2label, ignore_index))):
        raise InputError(problems)
    if auto_class is None:
        model = _bare_student(config)
    elif config.backbone is not None:
        ignored = {} if ignore_index is None else {"semantic_loss_ignore_index": ignore_index}
        model = _fpn_student(config, config.backbone, auto_class, {**_classes(id2label), **ignored, **fields})
    elif config.model is not None:
        model = _loaded_student(config, config.model, auto_class, {**_classes(id2label), **fields}, ignore_index)
    else:
        model = _random_student(config.config or {}, auto_class, id2label, ignore_index, fields)
    return model.train()


def _contradictions(given: Mapping[str, Any], id2label: Mapping[int, str], ignore_index: int | None) -> Iterator[str]:
    """Settings of `student.config` that the data set too, to another value."""
    names = {str(index): name for index, name in id2label.items()}
    wanted: dict[str, Any] = {"num_labels": len(names), "id2label": names, **dict.fromkeys(IGNORE_KEYS, ignore_index)}
    for key, value in wanted.items():
        written = given.get(key)
        if isinstance(written, Mapping):
            written = {str(index): name for index, name in written.items()}
        if None not in (written, value) and written != value:
            setting = "data.ignore_index" if key in IGNORE_KEYS else "data.labels"
            said = str(value) if isinstance(value, int) else "the classes of the data"
            yield f"student.config.{key}: expected {said}, as {setting} sets it, got {str(written)[:80]}; leave it out"


def load_student(auto_class: Any, folder: str | Path, revision: str | None, task: str) -> PreTrainedModel:
    """A saved student in float32. Raises InputError if there is none that the auto class knows."""
    register()
    try:
        return auto_class.from_pretrained(folder, revision=revision or "main", dtype=torch.float32)
    except NOT_LOADED as error:
        raise InputError(f"{folder}: expected a saved {task} student, found none: {first_line(error)}") from error


def _hub(config: StudentConfig) -> dict[str, Any]:
    return {"revision": config.revision, "trust_remote_code": config.trust_remote_code}


def _classes(id2label: Mapping[int, str]) -> dict[str, Any]:
    """The fields of a configuration that name the classes, if there are any."""
    names = {int(index): name for index, name in id2label.items()}
    return {} if not names else {"id2label": names, "label2id": {name: index for index, name in names.items()}}


def _bare_student(config: StudentConfig) -> PreTrainedModel:
    if config.fpn:
        raise InputError("student.fpn: a label-free run trains only the backbone, without a pyramid; remove it")
    if config.config is not None:
        return random_backbone(config.config)
    source = config.backbone if config.backbone is not None else config.model
    assert source is not None  # config.check()
    return load_backbone(source, **_hub(config))


def _fpn_student(
    config: StudentConfig, source: str | dict[str, Any], auto_class: Any, fields: Mapping[str, Any]
) -> PreTrainedModel:
    cls = FPN_CLASSES[auto_class.__name__]
    inner = backbone_config(source, **_hub(config))
    known = [name for name in inspect.signature(FPNConfig).parameters if name not in ("backbone_config", "kwargs")]
    unknown = [f"student.fpn.{key}: no such setting{nearest(key, known)}" for key in config.fpn if key not in known]
    if unknown:
        raise InputError(unknown)
    usual = USUAL.get(auto_class.__name__, {})
    try:
        model = cls(FPNConfig(backbone_config=inner, **{**usual, **fields, **config.fpn}))
    except (ValueError, RuntimeError, TypeError) as error:
        raise InputError(f"student: cannot be built: {first_line(error)}") from error
    if isinstance(source, str) or "pretrained" in source:
        loaded = load_backbone(source, out_indices=model.config.backbone_config.out_indices, **_hub(config))
        model.backbone.load_state_dict(loaded.state_dict())
    return model


def _random_student(
    values: dict[str, Any],
    auto_class: Any,
    id2label: Mapping[int, str],
    ignore_index: int | None,
    fields: Mapping[str, Any],
) -> PreTrainedModel:
    inner = values.get("backbone_config")
    inner = inner if isinstance(inner, dict) and "pretrained" in inner else None
    if inner is not None:
        inner_config = backbone_config(inner)
        values = {**values, "backbone_config": {"model_type": inner_config.model_type, **inner_config.to_diff_dict()}}
    config = config_from_dict({**values, **_classes(id2label)}, "student.config")
    _check_task(config, auto_class, "student.config")
    _set_ignore_index(config, ignore_index)
    _set_fields(config, fields)
    if problem := stage_problem(config, auto_class):
        raise InputError(f"student.config.{problem}")
    try:
        model = from_config(auto_class, config)
    except (ValueError, RuntimeError, TypeError, StrictDataclassError, ImportError) as error:
        raise InputError(f"student.config: {config.model_type} cannot be built: {first_line(error)}") from error
    if inner is not None:
        _fill_backbone(model, load_backbone(inner, out_indices=model.config.backbone_config.out_indices))
    return model


def _fill_backbone(model: PreTrainedModel, loaded: PreTrainedModel) -> None:
    """Copies a backbone's weights into the backbone inside a native model, which may have frozen norms instead."""
    # Native detectors unwrap timm's module.
    for source in (loaded, getattr(loaded, "_backbone", loaded)):
        state = _uncounted(source)
        for module in model.modules():
            if state.keys() == _uncounted(module).keys():
                module.load_state_dict(state, strict=False)
                return
    raise InputError(
        f"student.config.backbone_config: {model.config.model_type} keeps no backbone like {type(loaded).__name__}; "
        "give it one without `pretrained`"
    )


def _uncounted(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A module's tensors without the batch counters of norms, which frozen norms lack."""
    return {name: value for name, value in module.state_dict().items() if not name.endswith("num_batches_tracked")}


def _loaded_student(
    student: StudentConfig, name: str, auto_class: Any, fields: Mapping[str, Any], ignore_index: int | None
) -> PreTrainedModel:
    config = load_config(name, _hub(student))
    _check_task(config, auto_class, f"student.model {name}", student.trust_remote_code)
    before = config.num_labels
    _set_fields(config, fields)
    _set_ignore_index(config, ignore_index)
    try:
        options = {"ignore_mismatched_sizes": True, "output_loading_info": True, **_hub(student)}
        model, info = auto_class.from_pretrained(name, config=config, dtype=torch.float32, **options)
    except NOT_LOADED as error:
        raise not_loaded(f"student.model {name}: cannot be loaded: {first_line(error)}", name) from error
    _check_head(name, model, info, before, config.num_labels or 0)
    return model


def _set_fields(config: PretrainedConfig, fields: Mapping[str, Any]) -> None:
    for key, value in fields.items():
        setattr(config, key, value)


def _check_task(config: PretrainedConfig, auto_class: Any, place: str, trust_remote_code: bool = False) -> None:
    remote = trust_remote_code and auto_class.__name__ in (config.to_dict().get("auto_map") or {})
    if type(config) not in auto_class._model_mapping and not remote:
        raise InputError(
            f"{place}: expected a model type that {auto_class.__name__} knows, got {config.model_type!r}; "
            "for a plain backbone use student.backbone"
        )


def _set_ignore_index(config: PretrainedConfig, ignore_index: int | None) -> None:
    if ignore_index is None:
        return
    names = [key for key in IGNORE_KEYS if key in config.to_dict()]
    for key in names:
        setattr(config, key, ignore_index)
    if not names:
        logger.warning("%s has no setting for the ignored label; its own loss decides", config.model_type)


def _check_head(name: str, model: PreTrainedModel, info: dict[str, Any], before: int | None, classes: int) -> None:
    """Only classifiers of another class count, or a whole new head, may be initialised at random."""
    mismatched = sorted(entry[0] for entry in info["mismatched_keys"])
    shapes = model.state_dict()
    foreign = [key for key in mismatched if before == classes or shapes[key].shape[0] != classes]
    missing = set(info["missing_keys"]) - set(mismatched)
    fresh = _whole_heads(model, missing)
    missing = {key for key in missing if key.split(".")[0] not in fresh}
    check_complete(f"student.model {name}", missing, foreign)
    if mismatched:
        text = "%s: classified %d classes, the data has %d: these parameters start at random: %s"
        logger.warning(text, name, before, classes, ", ".join(mismatched))
    if fresh:
        logger.warning("%s: holds no weights for %s, which starts at random", name, ", ".join(sorted(fresh)))


def _whole_heads(model: PreTrainedModel, missing: set[str]) -> set[str]:
    """Top-level modules without a single weight in the checkpoint, such as the new head of an ImageNet encoder.

    Never the base model: a student with random weights must be requested explicitly (`student.config`).
    """
    keys = list(model.state_dict())
    loaded = {key.split(".")[0] for key in keys if key not in missing and not key.endswith("num_batches_tracked")}
    whole = {key.split(".")[0] for key in keys} - loaded
    return set() if model.base_model_prefix in whole or not loaded else whole
