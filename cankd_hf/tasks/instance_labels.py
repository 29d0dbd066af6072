"""Boxes and masks from a teacher's detections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cankd_hf.run_lengths import decoded, encoded
from cankd_hf.tasks.detection_labels import LIMIT, BoxLabelling
from cankd_hf.tasks.instance_outputs import instances, tinted
from cankd_hf.tasks.labelling import Prediction
from cankd_hf.tasks.pictures import class_colours


class InstanceLabelling(BoxLabelling):
    """Writes the objects that score at least the threshold of their class, with their masks as COCO's run lengths, and
    the weaker ones beside them. Thresholds are those of `BoxLabelling`; a detection whose mask is empty is none."""

    written = ("bbox", "category", "score", "segmentation")

    @torch.no_grad()
    def predict(self, outputs: Any, sizes: Sequence[tuple[int, int]], model_type: str) -> list[Prediction]:
        made = []
        for found, size in zip(instances(outputs, torch.tensor(sizes), sizes, model_type, LIMIT), sizes, strict=True):
            seen = found["masks"].flatten(1).any(1)
            scores, labels, boxes, masks = (found[name][seen].cpu() for name in ("scores", "labels", "boxes", "masks"))
            prediction = self._predicted(scores, labels, boxes, size)
            inside = boxes.clamp(min=0).minimum(torch.tensor([size[1], size[0]] * 2).to(boxes))
            there = self._there(scores, labels, inside)
            prediction.facts["segmentation"] = _plain(encoded(masks[there].numpy()), size)
            made.append(prediction)
        return made

    def given(self, label: Any) -> Prediction:
        prediction = super().given(label)
        prediction.facts["objects"]["segmentation"] = _plain(label.outlines or (), label.size)
        return prediction

    def draw(self, image: Tensor, line: Mapping[str, Any], mask: Tensor | None) -> np.ndarray:
        found = line.get("objects") or {}
        if shapes := found.get("segmentation"):
            size = (image.shape[-2], image.shape[-1])
            masks = torch.from_numpy(decoded([one["counts"].encode() for one in shapes], *size))
            colours = class_colours(len(self.id2label), None)
            pixels = image.permute(1, 2, 0).numpy() / 255
            painted = tinted(pixels, masks, torch.tensor(found["category"]), colours)
            image = torch.from_numpy((painted * 255).round().astype(np.uint8)).permute(2, 0, 1)
        return super().draw(image, line, mask)


def _plain(counts: Sequence[bytes], size: tuple[int, int]) -> list[dict[str, Any]]:
    """Run lengths as json has them."""
    return [{"size": list(size), "counts": one.decode("ascii")} for one in counts]
