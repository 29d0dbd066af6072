"""The families of transformers that segment instances: how labels of detection with `masks` go into them.

How their answers are read is in `tasks.instance_outputs`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import (
    AutoModelForInstanceSegmentation,
    AutoModelForUniversalSegmentation,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.loss import loss_rf_detr
from transformers.models.auto.modeling_auto import MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING_NAMES

from cankd_hf.errors import InputError
from cankd_hf.models.detr_num_boxes import patch_detr_num_boxes, patch_num_masks
from cankd_hf.models.fpn.configuration_cankd_fpn import FPNConfig

# Families whose queries are masks alone: they take `mask_labels` and `class_labels`, and a box is that of its mask.
UNIVERSAL = ("mask2former", "maskformer", "eomt", "eomt_dinov3")
# Those that predict a box beside each mask, and take the labels of detectors with `masks` in them.
BOXED = ("detr", "rf_detr")
NATIVE = UNIVERSAL + BOXED
NOT_TRAINED = {"oneformer": "its loss reads a text for each image", "videomt": "it reads videos"}


# Those that make masks of maps of several strides; most backbones give only their last map unless asked for more.
STAGED, FEWEST_STAGES = ("mask2former", "maskformer", "detr"), 3


class MaskLabels:
    """A forward pre-hook that gives a model labels of detection with `masks` in its own form."""

    def __call__(self, module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        labels = kwargs.get("labels")
        rest = {name: value for name, value in kwargs.items() if name != "labels"}
        if labels is not None:
            # Nearest or bilinear samples of them are taken, which bool and bytes have not.
            rest["mask_labels"] = [label["masks"].float() for label in labels]
            rest["class_labels"] = [label["class_labels"] for label in labels]
        if getattr(module.config, "use_auxiliary_loss", False) and module.config.model_type == "maskformer":
            rest["output_hidden_states"] = True  # its layers' answers are of these, and it does not ask for them
        return args, rest


def knows(architecture: str) -> bool:
    """Whether a model of this class name segments instances, and is one of these families."""
    ends = ("ForInstanceSegmentation", "ForUniversalSegmentation", "DetrForSegmentation")
    return architecture.endswith(ends) and not architecture.lower().startswith(tuple(NOT_TRAINED))


def auto_class(model_type: str | None) -> Any:
    """The auto class that loads a family for instance segmentation, ours included.

    Raises:
        InputError: for a family that cannot be trained.
    """
    if model_type in NOT_TRAINED:
        raise InputError(
            f"student: {model_type} cannot be trained here, because {NOT_TRAINED[model_type]}; take one of "
            f"{', '.join(NATIVE)}"
        )
    known = MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING_NAMES.keys() - UNIVERSAL
    ours = model_type in (None, FPNConfig.model_type)  # None: a backbone with one of our heads
    return AutoModelForInstanceSegmentation if ours or model_type in known else AutoModelForUniversalSegmentation


def stage_problem(config: PretrainedConfig, loader: Any) -> str | None:
    """Why a model for instance segmentation cannot be built of this configuration; None if it can.

    `loader`: the auto class it is built with.
    """
    if config.model_type not in STAGED or loader not in (
        AutoModelForUniversalSegmentation,
        AutoModelForInstanceSegmentation,
    ):
        return None
    given = list(getattr(config.backbone_config, "out_indices", None) or ())
    if len(given) >= FEWEST_STAGES:
        return None
    return (
        f"backbone_config: {config.model_type} makes masks of the maps of at least {FEWEST_STAGES} stages, got "
        f"{len(given)}; name them, such as out_indices: [1, 2, 3, 4]"
    )


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Makes a native model take labels of detection with `masks`, and mends its loss; others stay as they are."""
    if model.config.model_type in UNIVERSAL and not any(
        isinstance(hook, MaskLabels) for hook in model._forward_pre_hooks.values()
    ):
        model.register_forward_pre_hook(MaskLabels(), prepend=True, with_kwargs=True)
    patch_detr_num_boxes()
    patch_num_masks(model)
    if model.config.model_type == "rf_detr":
        _add_up_empty_losses()
    return model


def _add_up_empty_losses() -> None:
    """Makes the mask losses of RF-DETR numbers also for a batch without objects, where transformers 5.24 returns a
    tensor without elements in their place, and the whole loss becomes one."""
    own = loss_rf_detr.RfDetrImageLoss.loss_masks
    if getattr(own, "adds_up", False):
        return

    def loss_masks(self: Any, outputs: Any, targets: Any, indices: Any, num_boxes: Any) -> dict[str, Tensor]:
        found: dict[str, Tensor] = own(self, outputs, targets, indices, num_boxes)
        if all(value.ndim == 0 for value in found.values()):
            return found
        nothing = outputs["pred_masks"][self._get_source_permutation_idx(indices)].sum()  # 0, with a gradient of 0
        return dict.fromkeys(found, nothing)

    loss_masks.adds_up = True  # type: ignore[attr-defined]
    loss_rf_detr.RfDetrImageLoss.loss_masks = loss_masks  # type: ignore[method-assign]
