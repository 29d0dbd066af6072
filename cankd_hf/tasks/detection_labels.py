"""Boxes from a teacher's detections."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from cankd_hf.tasks.detection_outputs import best_pairs
from cankd_hf.tasks.labelling import Labelling, Prediction, Summary, vanished
from cankd_hf.tasks.pictures import class_colours

THRESHOLD = 0.5  # without priors, as in PseCo and Unbiased Teacher v2
DOUBTFUL = 0.4  # the least threshold in use (Semi-DETR): below it, priors ask for more boxes than a teacher is sure of
FLOOR = 0.05  # what scores less is no candidate (LabelMatch)
LIMIT = 300  # candidates of a picture
BINS = 20


class BoxLabelling(Labelling):
    """Writes the boxes that score at least the threshold of their class, and the weaker ones beside them.

    With priors the threshold of a class is where as many boxes are kept as labelled pictures lead to expect
    (LabelMatch, arXiv:2206.06608, which takes a fifth of them as reliable: `Choices.keep`).
    """

    beside: ClassVar[Mapping[str, str]] = {}
    written: ClassVar[tuple[str, ...]] = ("bbox", "category", "score")  # of each object

    @property
    def settings(self) -> list[Any]:
        return [self.least]

    @property
    def keep(self) -> float:
        """The share of the expected boxes that is kept."""
        return 1.0 if self.choices.keep is None else self.choices.keep

    @property
    def least(self) -> float:
        """Score below which a box is no candidate."""
        return min(FLOOR, *(self.threshold_of(label, FLOOR) for label in self.id2label))

    @classmethod
    def prior(cls, labels: Iterable[Any], classes: int) -> np.ndarray:
        total = np.zeros(classes)
        for label in labels:
            single = label.classes[label.iscrowd == 0]
            total += torch.bincount(single[single < classes], minlength=classes).numpy()
        return total

    @torch.no_grad()
    def predict(self, outputs: Any, sizes: Sequence[tuple[int, int]], model_type: str) -> list[Prediction]:
        pairs = best_pairs(outputs, torch.tensor(sizes), model_type, LIMIT)
        found = zip(*(part.cpu() for part in pairs), sizes, strict=True)
        return [self._predicted(*one) for one in found]

    def _predicted(self, scores: Tensor, labels: Tensor, boxes: Tensor, size: tuple[int, int]) -> Prediction:
        boxes = boxes.clamp(min=0).minimum(torch.tensor([size[1], size[0]] * 2).to(boxes))
        wide = boxes[:, 2:] - boxes[:, :2]
        there = self._there(scores, labels, boxes)
        written = torch.cat([boxes[:, :2], wide], 1)[there].double().round(decimals=2)
        facts = {
            "bbox": written.tolist(),
            "category": labels[there].tolist(),
            "score": scores[there].double().round(decimals=4).tolist(),
        }
        sure = (2 * scores[there] - 1).abs()
        return Prediction({}, facts, float(sure.mean()) if len(sure) else 1.0)

    def _there(self, scores: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
        """Which detections, whose boxes are within the picture, are candidates, bool [n]."""
        named = torch.tensor([int(label) in self.id2label for label in labels], dtype=torch.bool)
        return (scores >= self.least) & (boxes[:, 2:] - boxes[:, :2] > 0.5).all(1) & named

    def given(self, label: Any) -> Prediction:
        corners = label.boxes
        written = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).double().round(decimals=3)
        facts = {
            "bbox": written.tolist(),
            "category": label.classes.tolist(),
            "area": label.area.tolist(),
            "iscrowd": label.iscrowd.tolist(),
        }
        return Prediction({}, {"objects": facts}, 1.0)

    def summary(self, facts: Sequence[Mapping[str, Any]]) -> Summary:
        scores = np.array([score for one in facts for score in one["score"]])
        labels = np.array([label for one in facts for label in one["category"]], dtype=np.int64)
        thresholds, rows = [], dict[str, dict[str, float | None]]()
        for label, name in sorted(self.id2label.items()):
            own = np.sort(scores[labels == label])[::-1]
            expected = None if self.priors is None else float(self.priors[label] / max(self.images, 1))
            threshold = self.threshold_of(label, self._matching(own, expected, len(facts)))
            thresholds.append(threshold)
            kept = own[own >= threshold]
            rows[name] = {
                "threshold": threshold,
                "confidence": float(kept.mean()) if len(kept) else None,
                "candidates": float(len(own)),
                "kept": len(kept) / len(own) if len(own) else None,
                "share": len(kept) / max(len(facts), 1),
                "prior": float(own.sum()) / max(len(facts), 1) if expected is None else expected,
            }
        shares = {name: float(row["share"] or 0) for name, row in rows.items()}
        priors = {name: float(row["prior"] or 0) * self.keep for name, row in rows.items()}
        warnings = vanished(shares, priors, "boxes an image")
        warnings += [
            f"{name}: as many boxes as --labelled lets expect takes a threshold of {row['threshold']:.3g}, at which "
            f"most may be wrong: look at them, or set one (--threshold {name}=0.5)"
            for name, row in rows.items()
            if self.priors is not None and row["kept"] and (row["threshold"] or 0) < DOUBTFUL and not self._set(name)
        ]
        bins = np.histogram(scores, BINS, (0, 1))[0].tolist()
        return Summary(thresholds, rows, warnings, bins, "boxes")

    def _set(self, name: str) -> bool:
        """Whether the user set the threshold of a class."""
        return self.choices.threshold is not None or name in self.choices.thresholds

    def _matching(self, scores: np.ndarray, expected: float | None, images: int) -> float:
        """The threshold of a class, from its scores in descending order and the boxes to expect in an image."""
        if expected is None:
            return THRESHOLD
        count = round(expected * self.keep * images)
        if count == 0:
            return 1.0
        return max(FLOOR, float(scores[min(count, len(scores)) - 1])) if len(scores) else FLOOR

    def line(self, facts: Mapping[str, Any], size: tuple[int, int], number: int, summary: Summary) -> dict[str, Any]:
        made: dict[str, Any] = {"width": size[1], "height": size[0], "image_id": number}
        if "objects" in facts:  # of a labelled set
            return {**made, "objects": facts["objects"]}
        rows = list(zip(*(facts[name] for name in self.written), strict=True))
        kept = [row for row in rows if row[2] >= summary.thresholds[row[1]]]
        rest = [row for row in rows if row[2] < summary.thresholds[row[1]]]
        for key, chosen in (("objects", kept), ("candidates", rest)):
            made[key] = {name: [row[place] for row in chosen] for place, name in enumerate(self.written)}
        return made

    def draw(self, image: Tensor, line: Mapping[str, Any], mask: Tensor | None) -> np.ndarray:
        found = line.get("objects") or {}
        if not found.get("bbox"):
            return image.permute(1, 2, 0).numpy()
        boxes = torch.tensor(found["bbox"], dtype=torch.float32)
        colours = class_colours(len(self.id2label), None).tolist()
        scores = found.get("score")
        drawn = draw_bounding_boxes(
            image.contiguous(),
            torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1),
            labels=None if scores is None else [f"{score:.2f}" for score in scores],
            colors=[tuple(colours[label]) for label in found["category"]],
            width=max(1, round(min(image.shape[-2:]) / 160)),
        )
        return drawn.permute(1, 2, 0).numpy()
