"""Each channel as a distribution over positions (CWD)."""

from torch import Tensor

from cankd_hf.losses.base import FeatureLoss, above_zero
from cankd_hf.losses.kernels.divergence import mean_divergence


class ChannelWiseLoss(FeatureLoss):
    """KL divergence of the channels' softmax over positions (CWD, Shu et al. 2021, section 3.2).

    `T^2 * mean over B, C of KL(softmax(t / T) || softmax(s / T))`, each softmax over the H * W positions of a channel.

    Args:
        channels: channels C of both maps.
        temperature: T; the authors use 4 for logits as maps and 1 for features of detectors.

    Shape:
        student and teacher [B, C, H, W] -> [].
    """

    paper = "2011.13256"
    citation = (
        "@inproceedings{shu2021cwd, title={Channel-wise Knowledge Distillation for Dense Prediction}, author={Shu, "
        "Changyong and Liu, Yifan and Gao, Jianfei and Yan, Zheng and Shen, Chunhua}, booktitle={ICCV}, year={2021}}"
    )

    def __init__(self, channels: int, temperature: float = 1.0) -> None:
        super().__init__(channels)
        above_zero("ChannelWiseLoss", temperature=temperature)
        self.temperature = temperature

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss [] of two checked maps [B, C, H, W]."""
        return self.temperature**2 * mean_divergence(student.flatten(2), teacher.flatten(2), -1, self.temperature)
