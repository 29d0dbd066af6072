"""Feature losses: two maps [B, C, H, W] in, one unweighted scalar out."""

from __future__ import annotations

from cankd_hf.config.distill import LossTerm
from cankd_hf.losses.attention import attention_map
from cankd_hf.losses.base import FeatureLoss
from cankd_hf.losses.cankd import CanKDLoss
from cankd_hf.losses.instance_mse import InstanceMSELoss

LOSSES: dict[str, type[FeatureLoss]] = {"cankd": CanKDLoss, "instance_mse": InstanceMSELoss}

__all__ = ["LOSSES", "CanKDLoss", "FeatureLoss", "InstanceMSELoss", "LossTerm", "attention_map"]
