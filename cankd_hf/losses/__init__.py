"""Distillation losses: two maps or two logits of one shape in, one unweighted scalar out."""

from cankd_hf.config.distill import LossTerm
from cankd_hf.losses.attention import attention_map
from cankd_hf.losses.attention_transfer import AttentionTransferLoss
from cankd_hf.losses.base import DistillationLoss, FeatureLoss, LogitsLoss
from cankd_hf.losses.cankd import CanKDLoss
from cankd_hf.losses.channel_wise import ChannelWiseLoss
from cankd_hf.losses.cosine import CosineLoss
from cankd_hf.losses.cross_head import CrossHeadLoss
from cankd_hf.losses.dense_logits import DenseLogitsLoss
from cankd_hf.losses.dist import DistLoss
from cankd_hf.losses.dkd import DKDLoss
from cankd_hf.losses.focal_global import FocalGlobalLoss
from cankd_hf.losses.frequency import FrequencyLoss
from cankd_hf.losses.instance_mse import InstanceMSELoss
from cankd_hf.losses.kl import KLLoss
from cankd_hf.losses.masked_generative import MaskedGenerativeLoss
from cankd_hf.losses.mse import MSELoss
from cankd_hf.losses.patch_similarity import PatchSimilarityLoss
from cankd_hf.losses.pearson import PearsonLoss
from cankd_hf.losses.pseudo_boxes import PseudoBoxesLoss
from cankd_hf.losses.query_logits import QueryLogitsLoss
from cankd_hf.losses.static_linear import StaticLinearLoss

LOSSES: dict[str, type[DistillationLoss]] = {
    "cankd": CanKDLoss,
    "instance_mse": InstanceMSELoss,
    "static_linear": StaticLinearLoss,
    "mse": MSELoss,
    "cosine": CosineLoss,
    "pearson": PearsonLoss,
    "channel_wise": ChannelWiseLoss,
    "masked_generative": MaskedGenerativeLoss,
    "attention_transfer": AttentionTransferLoss,
    "focal_global": FocalGlobalLoss,
    "patch_similarity": PatchSimilarityLoss,
    "frequency": FrequencyLoss,
    "kl": KLLoss,
    "dist": DistLoss,
    "dkd": DKDLoss,
    "dense_logits": DenseLogitsLoss,
    "cross_head": CrossHeadLoss,
    "query_logits": QueryLogitsLoss,
}
# Terms whose value is the student's own loss on what the teacher chooses: they compare no tensors.
OWN_LOSSES: dict[str, type[DistillationLoss]] = {"pseudo_boxes": PseudoBoxesLoss}


def loss_named(name: str) -> type[DistillationLoss]:
    """The class of a loss by its name in a recipe."""
    return LOSSES[name] if name in LOSSES else OWN_LOSSES[name]


__all__ = [
    "LOSSES",
    "OWN_LOSSES",
    "AttentionTransferLoss",
    "CanKDLoss",
    "ChannelWiseLoss",
    "CosineLoss",
    "CrossHeadLoss",
    "DKDLoss",
    "DenseLogitsLoss",
    "DistLoss",
    "DistillationLoss",
    "FeatureLoss",
    "FocalGlobalLoss",
    "FrequencyLoss",
    "InstanceMSELoss",
    "KLLoss",
    "LogitsLoss",
    "LossTerm",
    "MSELoss",
    "MaskedGenerativeLoss",
    "PatchSimilarityLoss",
    "PearsonLoss",
    "PseudoBoxesLoss",
    "QueryLogitsLoss",
    "StaticLinearLoss",
    "attention_map",
    "loss_named",
]
