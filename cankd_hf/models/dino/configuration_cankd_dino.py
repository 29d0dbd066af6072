"""Configuration of DINO (Zhang et al. 2022, arXiv:2203.03605) on any backbone of `transformers` or timm.

This file travels with every saved detector (`trust_remote_code=True`), so it imports nothing of `cankd_hf`.
"""

import copy
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, PretrainedConfig

GROUPS = 32  # of the norms after the input projections

# Least values of the settings that are numbers.
WHOLE = {
    **{"num_queries": 1, "num_feature_levels": 1, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 1},
    **{"decoder_ffn_dim": 1, "encoder_attention_heads": 1, "decoder_attention_heads": 1, "encoder_n_points": 1},
    **{"decoder_n_points": 1, "num_denoising": 0, "d_model": GROUPS},
}
NUMBERS = (
    *("box_noise_scale", "class_cost", "bbox_cost", "giou_cost", "class_loss_coefficient", "bbox_loss_coefficient"),
    *("giou_loss_coefficient", "denoising_loss_coefficient", "encoder_loss_coefficient", "position_temperature"),
)
SHARES = ("box_edge", "dropout", "attention_dropout", "activation_dropout", "label_noise_ratio", "focal_alpha")


class DINOConfig(PretrainedConfig):
    r"""Everything that shapes a `DINOForObjectDetection`.

    The defaults are the paper's DINO-4scale with a ResNet-50: those of the authors' `config/DINO/DINO_4scale.py`
    (below: A), of the logged run of its published weights (`logs/DINO/R50-MS4/config_cfg.py`) where the two differ.

    Args:
        backbone_config: configuration (or its dictionary, with `model_type`) of any `AutoBackbone` of several strides;
            a ResNet-50 of `transformers` if absent. Where it asks for the last stage only (the default of all of
            them), the last three stages are taken: strides 8, 16, 32 (A: `return_interm_indices = [1, 2, 3]`).
        freeze_stem: whether the stem and the first stage of a ResNet are never trained, as in DETR (the authors'
            `backbone.py` trains `layer2` to `layer4`). Other backbones are trained whole.
        num_feature_levels: number of scales: those of the backbone, then 3x3 convolutions of stride 2 (A: 4; 5 with
            four stages of the backbone).
        d_model: width of all maps and queries (A: 256), a multiple of 32.
        encoder_layers, decoder_layers: 6 and 6 (A).
        encoder_attention_heads, decoder_attention_heads: 8 (A: `nheads`).
        encoder_ffn_dim, decoder_ffn_dim: width of the feed-forward layers, 2048 (A).
        encoder_n_points, decoder_n_points: keys sampled for each head and scale, 4 (A).
        dropout, attention_dropout, activation_dropout: 0 (A: `dropout`).
        activation_function: of the feed-forward layers, `"relu"` (A).
        num_queries: detections of an image before any selection: 900 (A). In images with fewer cells on all scales
            together, as many as there are cells.
        position_temperature: of the sine embedding of the maps, 20 (A: `pe_temperatureH`).
        position_offset: added in it to the numbers of rows and columns, which count from 1: 0 (A); -0.5 in OpenMMLab's
            `improved` setting.
        box_edge: the smallest share that counts in the logit of a box to which a head's output is added: 1e-3 (the
            authors' `inverse_sigmoid`), 1e-5 in the heads of OpenMMLab's. Between layers it is 1e-3 in both.
        share_heads: whether all decoder layers have one class head and one box head (A: `dec_pred_bbox_embed_share`);
            OpenMMLab's DINO has one for each layer. The encoder's proposals have heads of their own in both.
        num_denoising: about half the number of denoising queries of an image (A: `dn_number = 100`): an image with
            the most objects n of its batch has max(1, 100 // n) groups of n positive and n negative queries. 0: none.
        label_noise_ratio: half of it is the share of denoising queries with a class drawn at random (A: 0.5).
        box_noise_scale: of the boxes of denoising queries: positives move by up to half their size times this,
            negatives by up to twice as much (1.0 in the logged run and in OpenMMLab's; 0.4 in A at its first
            publication).
        class_cost, bbox_cost, giou_cost: of the matching, 2, 5 and 2 (A: `set_cost_class`, ...).
        class_loss_coefficient, bbox_loss_coefficient, giou_loss_coefficient: weights of the losses, 1, 5 and 2 (A).
        focal_alpha: of the focal loss, 0.25 (A); its gamma is 2.
        denoising_loss_coefficient: factor of the losses of denoising queries, 1 (the authors' `main.py` gives them
            the weights of the others).
        encoder_loss_coefficient: factor of the losses of the encoder's proposals, 1 (A: `interm_loss_coef`).
        auxiliary_loss: whether the decoder's earlier layers have losses too (A: true); the encoder always has.

    Raises:
        ValueError: for a value out of range, or a combination that cannot be built.
    """

    model_type = "cankd_dino"
    sub_configs = {"backbone_config": AutoConfig}
    attribute_map = {"hidden_size": "d_model", "num_attention_heads": "encoder_attention_heads"}
    disable_custom_kernels = True  # the attention of transformers asks for it
    if TYPE_CHECKING:
        num_labels: int  # the base class also allows None

    def __init__(
        self,
        backbone_config: dict[str, Any] | PretrainedConfig | None = None,
        freeze_stem: bool = True,
        num_feature_levels: int = 4,
        d_model: int = 256,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        encoder_attention_heads: int = 8,
        decoder_attention_heads: int = 8,
        encoder_ffn_dim: int = 2048,
        decoder_ffn_dim: int = 2048,
        encoder_n_points: int = 4,
        decoder_n_points: int = 4,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        activation_dropout: float = 0.0,
        activation_function: str = "relu",
        num_queries: int = 900,
        position_temperature: float = 20.0,
        position_offset: float = 0.0,
        box_edge: float = 1e-3,
        share_heads: bool = True,
        num_denoising: int = 100,
        label_noise_ratio: float = 0.5,
        box_noise_scale: float = 1.0,
        class_cost: float = 2.0,
        bbox_cost: float = 5.0,
        giou_cost: float = 2.0,
        class_loss_coefficient: float = 1.0,
        bbox_loss_coefficient: float = 5.0,
        giou_loss_coefficient: float = 2.0,
        focal_alpha: float = 0.25,
        denoising_loss_coefficient: float = 1.0,
        encoder_loss_coefficient: float = 1.0,
        auxiliary_loss: bool = True,
        **kwargs: Any,
    ) -> None:
        given = dict(locals())
        for name, value in given.items():
            if name not in ("self", "kwargs", "backbone_config", "__class__"):
                setattr(self, name, value)
        self._check()
        self.backbone_config = self._backbone(backbone_config)
        super().__init__(**kwargs)

    def _check(self) -> None:
        for name, least in WHOLE.items():
            value = self.__dict__[name]
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"DINOConfig.{name}: expected a whole number of at least {least}, got {value!r}")
        for name in NUMBERS:
            value = self.__dict__[name]
            if not value >= 0:
                raise ValueError(f"DINOConfig.{name}: expected at least 0, got {value!r}")
        for name in SHARES:
            value = self.__dict__[name]
            if not 0 <= value <= 1:
                raise ValueError(f"DINOConfig.{name}: expected 0 to 1, got {value!r}")
        heads = (self.__dict__[f"{part}_attention_heads"] for part in ("encoder", "decoder"))
        if any(self.__dict__["d_model"] % count for count in (GROUPS, *heads)):
            raise ValueError(
                f"DINOConfig.d_model: expected a multiple of {GROUPS} and of the numbers of attention heads, got "
                f"{self.__dict__['d_model']}"
            )
        if not self.__dict__["position_temperature"] > 0:
            raise ValueError("DINOConfig.position_temperature: expected above 0, got 0")

    def _backbone(self, given: dict[str, Any] | PretrainedConfig | None) -> PretrainedConfig:
        """A private copy of the backbone's configuration, with its last three stages where it names one."""
        if given is None:
            given = {"model_type": "resnet"}
        if isinstance(given, dict):
            if "model_type" not in given:
                raise ValueError("DINOConfig.backbone_config: expected a key 'model_type', e.g. 'resnet'")
            config = AutoConfig.for_model(**given)
        else:
            config = copy.deepcopy(given)
        levels = self.__dict__["num_feature_levels"]
        if len(config.out_indices) == 1 and levels > 1:
            count = min(3, levels)
            named = config.model_type != "timm_backbone"  # timm names its stages only once the model is built
            last = len(config.stage_names) if named else 0
            config.out_indices = list(range(last - count, last))
        if len(config.out_indices) > levels:
            raise ValueError(
                f"DINOConfig.num_feature_levels: expected at least the {len(config.out_indices)} stages that the "
                f"backbone gives, got {levels}"
            )
        return config


DINOConfig.register_for_auto_class()
