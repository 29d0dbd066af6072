"""Configuration of the pyramid students: any backbone of `transformers` or timm, a neck, a head.

This file travels with every saved student (`trust_remote_code=True`), so it imports nothing of `cankd_hf`.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, PretrainedConfig

NECKS = ("fpn", "simple_pyramid", "none")
UNNECKED = ("psp", "aspp", "linear")  # heads that read the backbone's last map
SEGMENTATION_HEADS = ("fpn", "psp", "aspp")
DETECTION_HEADS = ("retinanet", "fcos", "faster_rcnn", "cascade_rcnn", "reppoints")
TWO_STAGE_HEADS = ("faster_rcnn", "cascade_rcnn")
MASK_HEADS = (*TWO_STAGE_HEADS, "fcos")  # detection heads that can have masks
DEPTH_HEADS = ("depth",)
CLASSIFICATION_HEADS = ("linear",)
HEADS = SEGMENTATION_HEADS + DETECTION_HEADS + DEPTH_HEADS + CLASSIFICATION_HEADS
HEADS_OF = {
    "FPNForSemanticSegmentation": SEGMENTATION_HEADS,
    "FPNForObjectDetection": DETECTION_HEADS,
    "FPNForDepthEstimation": DEPTH_HEADS,
    "FPNForImageClassification": CLASSIFICATION_HEADS,
}
DEPTH_KINDS = ("metric", "relative")
DEPTH_LOSSES = {"metric": ("silog", "log_l1"), "relative": ("ssi", "ssi_mad")}  # the first is the usual one
NORMS = dict.fromkeys((*SEGMENTATION_HEADS, *DEPTH_HEADS), ("batch", "group")) | {
    "linear": ("none",),
    "retinanet": ("none", "group"),
    "fcos": ("group",),
    "faster_rcnn": ("none",),
    "cascade_rcnn": ("none",),
    "reppoints": ("group",),
}
# What torchvision's detectors and the published RepPoints have; the first level of Faster R-CNN is finer than that of
# the dense heads.
DETECTION_DEFAULTS: dict[str, dict[str, Any]] = {
    "retinanet": {"strides": [8, 16, 32], "anchor_scale": 4.0, "score_threshold": 0.05, "nms_threshold": 0.5},
    "fcos": {"strides": [8, 16, 32], "anchor_scale": 1.0, "score_threshold": 0.2, "nms_threshold": 0.6},
    **dict.fromkeys(
        TWO_STAGE_HEADS,
        {"strides": [4, 8, 16, 32], "anchor_scale": 8.0, "score_threshold": 0.05, "nms_threshold": 0.5},
    ),
    "reppoints": {"strides": [8, 16, 32], "anchor_scale": 4.0, "score_threshold": 0.05, "nms_threshold": 0.5},
}
DETECTION_LAYERS = {"retinanet": 4, "fcos": 4, "reppoints": 3}  # in each tower
CONVENTIONS = ("torchvision", "openmmlab")
CONVENTIONAL = (*DETECTION_HEADS, "aspp")  # heads that differ between the two
DENSE_HEADS = ("retinanet", "fcos", "reppoints")
# Further choices of detectors and the heads that have each: what its first value does is the usual.
CHOICES: dict[str, tuple[tuple[str, ...], tuple[Any, ...]]] = {
    "extra_levels": (DENSE_HEADS, ("neck", "backbone")),
    "neck_norm": (DETECTION_HEADS, ("none", "group")),
    "distances": (("fcos",), ("linear", "exponential")),
    "centerness_on": (("fcos",), ("regression", "classification")),
    "masks": (MASK_HEADS, (False, True)),
}
MAX_RETINANET_LAYERS = 4  # torchvision's head has four
MAX_PYRAMID_STAGES = 6  # a backbone with more stages than this is a plain ViT: all of them have one stride


def of_another(model: str, head: str, own: Iterable[str]) -> str:
    """The message for a head that a model cannot have; `own` are those that it can."""
    other = next(name for name, heads in HEADS_OF.items() if head in heads)
    return f"{model}: {head!r} is a head for {other}; set head to one of {', '.join(own)}"


class FPNConfig(PretrainedConfig):
    r"""Everything that shapes an `FPNForSemanticSegmentation`, an `FPNForObjectDetection`, an
    `FPNForInstanceSegmentation`, an `FPNForDepthEstimation` or an `FPNForImageClassification`.

    Args:
        backbone_config: configuration (or its dictionary, with `model_type`) of any `AutoBackbone`; a ResNet-18
            of `transformers` if absent. Where it asks for the last stage only (the default of all of them) and the
            neck needs more, all stages of the pyramid are taken.
        neck: `"fpn"` (Lin et al. 2017, torchvision's module) for pyramids; `"simple_pyramid"` (ViTDet, Li et al.
            2022) for plain ViTs: several strides from the last map; `"none"`: the backbone's maps as they are.
            Default: `"none"` under the `"psp"`, `"aspp"` and `"linear"` heads, else `"fpn"`.
        fpn_channels: width of every map of the neck.
        strides: input pixels per cell of the neck's levels, each a power of two; default: every stride of the
            backbone from 4 on (`"fpn"`) or 4, 8, 16, 32 (`"simple_pyramid"`; with patch 14 they are 3.5, 7, 14, 28).
            For detection 8, 16, 32, to which two coarser levels come (two-stage heads: 4, 8, 16, 32, and one more).
        head: `"fpn"`: all levels fused at the finest; `"psp"`: pyramid pooling on the last map (Zhao et al. 2017);
            `"aspp"`: atrous pooling on the last map (DeepLabV3, Chen et al. 2017, torchvision's module). The last two
            are made for an output stride of 8, which timm backbones offer (`output_stride: 8`). For detection:
            `"retinanet"` (Lin et al. 2017), `"fcos"` (Tian et al. 2019), `"faster_rcnn"` (Ren et al. 2015), all
            torchvision's, `"cascade_rcnn"` (Cai & Vasconcelos 2018), and `"reppoints"` (Yang et al. 2019). For
            depth `"depth"`: as `"fpn"`, with one output. For whole images `"linear"`: one linear layer on the mean of
            the last map.
        head_channels: width of a segmentation head (128), and of the linear layers of two-stage heads (1024);
            the dense detection heads are as wide as the neck.
        head_layers: number of 3x3 convolutions before the classifier: 1 for segmentation and depth, 4 in each tower of
            `"retinanet"` (at most 4) and `"fcos"`, 3 in those of `"reppoints"`, 1 before the proposals of
            two-stage heads.
        norm: `"batch"` or `"group"`, in the head (the neck has none; a backbone keeps its own). For detection as
            published: `"none"` (or `"group"`) for `"retinanet"`, `"group"` for `"fcos"` and `"reppoints"`, `"none"`
            for two-stage heads.
        dropout: share of channels dropped before the classifier, 0 to below 1.
        pool_bins: grid sizes of the `"psp"` head.
        atrous_rates: dilations of the `"aspp"` head.
        auxiliary_weight: weight of a second classifier on the last map but one, in training only; 0: none; 0.4 in the
            authors' Cityscapes configurations.
        semantic_loss_ignore_index: label that is left out of the loss.
        anchor_scale: side of the smallest square anchor of a level over its stride: 4 for `"retinanet"`, 8 for
            two-stage heads; of `"fcos"` the radius of what counts as an object's centre and the range of sizes of a
            level grow with it (1); of `"reppoints"` the sizes of a level's objects, and the unit of its losses (4).
        score_threshold: detections below it are dropped, 0 to 1.
        nms_threshold: overlap from which the weaker of two boxes of a class is dropped, 0 to 1.
        topk_candidates: detections of a level that enter the suppression (dense heads).
        max_detections: detections of an image that are returned.
        masks: of two-stage heads and `"fcos"`, whether each detection gets a mask (Mask R-CNN, Cascade Mask R-CNN;
            prototypes and coefficients as in YOLACT), of an `FPNForInstanceSegmentation`.
        conventions: `"torchvision"`, or `"openmmlab"` for weights of MMDetection and MMSegmentation, which `cankd
            convert` sets: exact anchor sizes and strides (the points of `"fcos"` in the middle of their cells, and a
            factor of the distances for each level), box regressions limited on both sides, aligned RoI align with as
            many samples as a bin has cells, scores of `"fcos"` multiplied by the centre-ness, the mean logits of the
            stages of `"cascade_rcnn"`, a 3x3 convolution after the branches of `"aspp"`.
        extra_levels: of dense detection heads, what the two coarser levels are made of: the last map of the `"neck"`
            or of the `"backbone"`.
        extra_relu: whether a ReLU stands between these two levels.
        neck_norm: of detectors, `"group"` for group norm in the neck, after each convolution.
        distances: of `"fcos"`, how a distance comes of the head's output: `"linear"`, in strides and at least 0, or
            `"exponential"`, in pixels.
        centerness_on: of `"fcos"`, which of the two towers predicts it, `"regression"` or `"classification"`.
        deformable_stages: stages, 1 to 4, of a timm ResNet or ResNeXt whose 3x3 convolutions are deformable.
        depth_kind: of the `"depth"` head: `"metric"`, distances in metres, or `"relative"`, inverse distances up to an
            unknown scale and shift of each image.
        max_depth: of a metric one the farthest distance, at which its output saturates; absent: no bound.
        depth_loss: of the `"depth"` head: `"silog"` (Eigen et al. 2014) or `"log_l1"` for metric depth, `"ssi"` or
            `"ssi_mad"` (Ranftl et al. 2020) for relative depth. Default: the first.

    Raises:
        ValueError: for a value out of range, or a combination that cannot be built.
    """

    model_type = "cankd_fpn"
    sub_configs = {"backbone_config": AutoConfig}
    if TYPE_CHECKING:
        num_labels: int  # the base class also allows None

    def __init__(
        self,
        backbone_config: dict[str, Any] | PretrainedConfig | None = None,
        neck: str | None = None,
        fpn_channels: int = 128,
        strides: Sequence[int] | None = None,
        head: str = "fpn",
        head_channels: int | None = None,
        head_layers: int | None = None,
        norm: str | None = None,
        dropout: float = 0.1,
        pool_bins: Sequence[int] = (1, 2, 3, 6),
        atrous_rates: Sequence[int] = (12, 24, 36),
        auxiliary_weight: float = 0.0,
        semantic_loss_ignore_index: int = 255,
        anchor_scale: float | None = None,
        score_threshold: float | None = None,
        nms_threshold: float | None = None,
        topk_candidates: int = 1000,
        max_detections: int = 100,
        masks: bool = False,
        conventions: str = "torchvision",
        extra_levels: str = "neck",
        extra_relu: bool = True,
        neck_norm: str = "none",
        distances: str = "linear",
        centerness_on: str = "regression",
        deformable_stages: Sequence[int] = (),
        depth_kind: str = "metric",
        max_depth: float | None = None,
        depth_loss: str | None = None,
        **kwargs: Any,
    ) -> None:
        self._check_head(head)
        self.neck = ("none" if head in UNNECKED else "fpn") if neck is None else neck
        self.fpn_channels = fpn_channels
        self.strides = None if strides is None else list(strides)
        self.head = head
        usual_width = dict.fromkeys(TWO_STAGE_HEADS, 1024).get(head, 128)
        self.head_channels = usual_width if head_channels is None else head_channels
        self.head_layers = head_layers if head_layers is not None else DETECTION_LAYERS.get(head, 1)
        self.norm = norm if norm is not None else NORMS[head][0]
        self.dropout = dropout
        self.pool_bins, self.atrous_rates = list(pool_bins), list(atrous_rates)
        self.auxiliary_weight = auxiliary_weight
        self.semantic_loss_ignore_index = semantic_loss_ignore_index
        self.deformable_stages = list(deformable_stages)
        if head in DETECTION_HEADS:  # a segmentation model's configuration leaves them out
            selection = {"score_threshold": score_threshold, "nms_threshold": nms_threshold}
            self._set_detection({"strides": self.strides, "anchor_scale": anchor_scale, **selection})
            self.topk_candidates, self.max_detections = topk_candidates, max_detections
        choices: dict[str, Any] = {"extra_levels": extra_levels, "neck_norm": neck_norm}
        choices |= {"distances": distances, "centerness_on": centerness_on, "masks": masks}
        self._set_choices(choices, extra_relu, conventions)
        if head in DEPTH_HEADS:
            self.depth_kind, self.max_depth = depth_kind, max_depth
            self.depth_loss = depth_loss or DEPTH_LOSSES.get(depth_kind, ("",))[0]
        self._check()
        self.backbone_config = self._backbone(backbone_config)
        super().__init__(**kwargs)

    def _set_detection(self, given: dict[str, Any]) -> None:
        """Settings with a default of each head's own."""
        usual = DETECTION_DEFAULTS[self.head]
        chosen = {name: usual[name] if value is None else value for name, value in given.items()}
        self.strides = list(chosen["strides"])
        self.anchor_scale: float = chosen["anchor_scale"]
        self.score_threshold: float = chosen["score_threshold"]
        self.nms_threshold: float = chosen["nms_threshold"]

    def _set_choices(self, given: dict[str, Any], extra_relu: bool, conventions: str) -> None:
        """Those that a head has; of another head only what is not the usual, to be refused."""
        if self.head in CONVENTIONAL or conventions != CONVENTIONS[0]:
            self.conventions = conventions
        for name, value in given.items():
            heads, allowed = CHOICES[name]
            if self.head in heads or value != allowed[0]:
                setattr(self, name, value)
        if self.head in DENSE_HEADS or not extra_relu:
            self.extra_relu = extra_relu

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads a saved configuration. That of a backbone alone, as `model.base_model.save_pretrained` writes it,
        becomes the backbone's part of the default one."""
        values, unused = super().get_config_dict(*args, **kwargs)
        if values.get("model_type", cls.model_type) != cls.model_type:
            values = {"backbone_config": values}
        return values, unused

    @staticmethod
    def _check_head(head: str) -> None:
        if head not in HEADS:
            raise ValueError(
                f"FPNConfig.head: expected one of {', '.join(SEGMENTATION_HEADS)}, got {head!r}; for detection one of "
                f"{', '.join(DETECTION_HEADS)}, for depth 'depth', for whole images 'linear'"
            )

    def _check(self) -> None:
        for name, allowed in (("neck", NECKS), ("norm", NORMS[self.head])):
            value = self.__dict__[name]
            if value not in allowed:
                raise ValueError(f"FPNConfig.{name}: expected one of {', '.join(allowed)}, got {value!r}")
        self._check_conventions()
        whole = {"fpn_channels": 1, "head_channels": 1, "head_layers": 0, "topk_candidates": 1, "max_detections": 1}
        for name, least in whole.items():
            value = self.__dict__.get(name, least)  # a segmentation model lacks the last two
            if not isinstance(value, int) or value < least:
                raise ValueError(f"FPNConfig.{name}: expected a whole number of at least {least}, got {value!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"FPNConfig.dropout: expected 0 to below 1, got {self.dropout!r}")
        if self.auxiliary_weight < 0:
            raise ValueError(f"FPNConfig.auxiliary_weight: expected at least 0, got {self.auxiliary_weight!r}")
        if self.strides is not None and (
            not self.strides or any(not isinstance(s, int) or s < 1 or s & (s - 1) for s in self.strides)
        ):
            raise ValueError(f"FPNConfig.strides: expected powers of two such as [4, 8, 16, 32], got {self.strides!r}")
        if self.head in UNNECKED and self.neck != "none":
            raise ValueError(f"FPNConfig: the {self.head!r} head reads the backbone's last map; set neck to 'none'")
        if self.head in DETECTION_HEADS:
            self._check_detection()
        if self.head in DEPTH_HEADS:
            self._check_depth()

    def _check_conventions(self) -> None:
        """Those that weights made elsewhere need."""
        conventions = self.__dict__.get("conventions", CONVENTIONS[0])
        known = CONVENTIONS if self.head in CONVENTIONAL else CONVENTIONS[:1]
        if conventions not in known:
            raise ValueError(
                f"FPNConfig.conventions: expected one of {', '.join(known)} for {self.head!r}, got {conventions!r}"
            )
        for name, (heads, allowed) in CHOICES.items():
            value = self.__dict__.get(name, allowed[0])
            if self.head not in heads and value != allowed[0]:
                usual, got = (str(one).lower() if isinstance(one, bool) else repr(one) for one in (allowed[0], value))
                fix = f"leave it out, or set head to one of {', '.join(heads)}"
                raise ValueError(f"FPNConfig.{name}: expected {usual} for {self.head!r}, got {got}; {fix}")
            if value not in allowed:
                named = ", ".join(map(str, allowed))
                raise ValueError(f"FPNConfig.{name}: expected one of {named} for {self.head!r}, got {value!r}")
        needs = {"extra_levels": "backbone", "neck_norm": "group"}
        wrong = [name for name, value in needs.items() if self.__dict__.get(name) == value]
        if self.neck != "fpn" and wrong:
            raise ValueError(f"FPNConfig.{wrong[0]}: {needs[wrong[0]]!r} needs neck 'fpn', got {self.neck!r}")
        if not self.__dict__.get("extra_relu", True) and self.head not in DENSE_HEADS:
            raise ValueError(f"FPNConfig.extra_relu: expected true for {self.head!r}, got false")
        if self.head == "fcos" and self.conventions == "torchvision":
            for name in ("distances", "centerness_on"):
                if self.__dict__[name] != CHOICES[name][1][0]:
                    raise ValueError(
                        f"FPNConfig.{name}: expected {CHOICES[name][1][0]!r} with torchvision's conventions, got "
                        f"{self.__dict__[name]!r}; set conventions to 'openmmlab'"
                    )

    def _check_depth(self) -> None:
        if self.depth_kind not in DEPTH_KINDS:
            raise ValueError(
                f"FPNConfig.depth_kind: expected one of {', '.join(DEPTH_KINDS)}, got {self.depth_kind!r}"
            )
        if self.depth_loss not in DEPTH_LOSSES[self.depth_kind]:
            known = ", ".join(DEPTH_LOSSES[self.depth_kind])
            raise ValueError(
                f"FPNConfig.depth_loss: expected one of {known} for {self.depth_kind} depth, got {self.depth_loss!r}"
            )
        if self.max_depth is not None and not (self.depth_kind == "metric" and self.max_depth > 0):
            raise ValueError(f"FPNConfig.max_depth: expected above 0, and of metric depth, got {self.max_depth!r}")

    def _check_detection(self) -> None:
        if self.neck == "none":
            raise ValueError(f"FPNConfig: the {self.head!r} head needs a neck; set it to 'fpn' or 'simple_pyramid'")
        if self.head == "retinanet" and self.head_layers > MAX_RETINANET_LAYERS:
            raise ValueError(f"FPNConfig.head_layers: 'retinanet' has at most 4, got {self.head_layers}")
        if self.head in TWO_STAGE_HEADS and self.head_layers < 1:
            raise ValueError(f"FPNConfig.head_layers: {self.head!r} needs at least 1, got 0")
        if not self.anchor_scale > 0:
            raise ValueError(f"FPNConfig.anchor_scale: expected above 0, got {self.anchor_scale!r}")
        for name in ("score_threshold", "nms_threshold"):
            value = self.__dict__[name]
            if not 0 <= value <= 1:
                raise ValueError(f"FPNConfig.{name}: expected 0 to 1, got {value!r}")

    def _backbone(self, given: dict[str, Any] | PretrainedConfig | None) -> PretrainedConfig:
        """A private copy of the backbone's configuration, with the stages that the neck needs."""
        if given is None:
            given = {"model_type": "resnet", "depths": [2] * 4, "hidden_sizes": [64, 128, 256, 512]}
            given["layer_type"] = "basic"
        if isinstance(given, dict):
            if "model_type" not in given:
                raise ValueError("FPNConfig.backbone_config: expected a key 'model_type', e.g. 'resnet'")
            config = AutoConfig.for_model(**given)
        else:
            config = copy.deepcopy(given)
        stages = 3 if self.head in DETECTION_HEADS and self.strides == [8, 16, 32] else 4
        wanted = {"fpn": stages, "simple_pyramid": 1, "none": 2 if self.auxiliary_weight > 0 else 1}[self.neck]
        if len(config.out_indices) < wanted and len(config.out_indices) == 1:
            config.out_indices = self._last_stages(config, wanted)
        return config

    def _last_stages(self, config: PretrainedConfig, wanted: int) -> list[int]:
        if config.model_type == "timm_backbone":  # timm names its stages only once the model is built
            return list(range(-wanted, 0))
        count = len(config.stage_names)
        if count > MAX_PYRAMID_STAGES and self.neck == "fpn":
            raise ValueError(
                f"FPNConfig.neck: 'fpn' needs a backbone of several strides, but {config.model_type!r} has "
                f"{count - 1} blocks of one stride; use neck: simple_pyramid (or name out_indices in the backbone)"
            )
        first = 1 if config.stage_names[0] == "stem" and count > 1 else 0  # pvt_v2 has no stem
        return list(range(max(first, count - wanted), count))


FPNConfig.register_for_auto_class()
