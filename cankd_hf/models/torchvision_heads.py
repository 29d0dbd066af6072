"""torchvision's detectors and segmentation models with their heads, as `cankd label` runs them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection, get_model_weights, list_models
from torchvision.ops import box_convert

from cankd_hf.errors import InputError
from cankd_hf.models.torchvision_teachers import PREFIX, load_whole

NO_CLASS = ("__background__", "N/A")  # rows of torchvision's tables of categories that are no detector's class


class TorchvisionHead(nn.Module):
    """A whole model of torchvision, with outputs like those of our own.

    Args:
        model: the model.
        names: its classes, in the order of its outputs that are kept.
        rows: the numbers of these in its outputs.
        stands_for: a class name of the same task.
    """

    place: Tensor

    def __init__(self, model: nn.Module, names: Sequence[str], rows: Sequence[int], stands_for: str) -> None:
        super().__init__()
        self.model, self.names, self.stands_for = model, list(names), stands_for
        self.detects = hasattr(model, "transform")
        # A detector resizes and normalises its images itself.
        self.image_mean = (0.0, 0.0, 0.0) if self.detects else (0.485, 0.456, 0.406)
        self.image_std = (1.0, 1.0, 1.0) if self.detects else (0.229, 0.224, 0.225)
        place = torch.full((max(rows) + 1,), -1)
        place[list(rows)] = torch.arange(len(rows))
        self.register_buffer("place", place, persistent=False)

    @classmethod
    def load(cls, name: str, weights: str | None, names: Sequence[str] | None) -> "TorchvisionHead":
        """Loads a model, see `load_whole`; `names` are the classes of weights that come without any.

        Raises:
            InputError: as `load_whole`; also for a number of names that the model does not have.
        """
        model, _ = load_whole(name, weights)
        net = name.removeprefix(PREFIX)
        finds = net in list_models(module=detection)
        stands_for = "TorchvisionForObjectDetection" if finds else "TorchvisionForSemanticSegmentation"
        own: list[str] = list(get_model_weights(net).DEFAULT.meta["categories"])
        count = _classes(model)
        if weights is None or (names is None and count == len(own)):
            rows = [row for row, said in enumerate(own) if not finds or said not in NO_CLASS]
            return cls(model, [own[row] for row in rows], rows, stands_for)
        first = 1 if finds else 0  # row 0 is the background
        found = [f"class_{row}" for row in range(count - first)] if names is None else list(names)
        if len(found) not in (count, count - 1):
            raise InputError(
                f"{name}: its weights are of {count} classes, the background included, the labelled set has "
                f"{len(found)}; name the set that it was trained on as --labelled"
            )
        rows = list(range(count - len(found), count))
        return cls(model, found, rows, stands_for)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Images [B, 3, H, W] -> `logits` [B, K, h, w], or [B, N, K] and `pred_boxes` [B, N, 4] of all detections."""
        if not self.detects:
            return {"logits": self.model(pixel_values)["out"][:, self.place >= 0]}
        found: list[dict[str, Tensor]] = self.model(list(pixel_values))
        count = max(1, *(len(one["scores"]) for one in found))
        logits = pixel_values.new_full((len(found), count, len(self.names)), -torch.inf)
        boxes = pixel_values.new_zeros(len(found), count, 4)
        height, width = pixel_values.shape[-2:]
        for number, one in enumerate(found):
            labels = self.place[one["labels"].clamp(max=len(self.place) - 1)]
            known = (labels >= 0) & (one["labels"] < len(self.place))
            rows = torch.arange(int(known.sum()), device=labels.device)
            logits[number, rows, labels[known]] = one["scores"][known].logit(1e-6)
            corners = one["boxes"][known] / one["boxes"].new_tensor([width, height, width, height])
            boxes[number, : len(rows)] = box_convert(corners, "xyxy", "cxcywh")
        return {"logits": logits, "pred_boxes": boxes}


def _classes(model: Any) -> int:
    """The number of classes of a model, a background included: the rows of its classifier."""
    last = [module for name, module in model.named_modules() if _classifies(name)]
    head = getattr(getattr(model, "head", None), "classification_head", None)
    if head is not None:
        return int(getattr(head, "num_classes", None) or head.num_columns)
    if not last:
        raise InputError(f"teacher: expected a classifier in {type(model).__name__}, found none")
    return int(getattr(last[-1], "out_channels", None) or last[-1].out_features)


def _classifies(name: str) -> bool:
    return name.endswith(("cls_score", "classifier.4", "classifier.low_classifier"))
