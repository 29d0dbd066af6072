"""Distillation losses: two maps or two logits of one shape in, one unweighted scalar out."""

from cankd_hf.config.distill import LossTerm
from cankd_hf.losses.attention import attention_map
from cankd_hf.losses.base import DistillationLoss, FeatureLoss, LogitsLoss
from cankd_hf.losses.cankd import CanKDLoss
from cankd_hf.losses.instance_mse import InstanceMSELoss

LOSSES: dict[str, type[DistillationLoss]] = {"cankd": CanKDLoss, "instance_mse": InstanceMSELoss}

__all__ = [
    "LOSSES",
    "CanKDLoss",
    "DistillationLoss",
    "FeatureLoss",
    "InstanceMSELoss",
    "LogitsLoss",
    "LossTerm",
    "attention_map",
]
