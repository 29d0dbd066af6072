"""Masks from a teacher's logits."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from cankd_hf.data.common.soft import KEY, hard, levels_of, likeliest, to_png
from cankd_hf.errors import InputError
from cankd_hf.tasks.labelling import Labelling, Prediction, Summary, vanished
from cankd_hf.tasks.pictures import class_colours

THRESHOLD = 0.95  # of hard masks; soft ones have none
BINS = 20
SOFT_STRIDE = 4  # finest grid of stored probabilities
SMALL = 255  # classes up to which a mask is a byte a pixel, with 255 as void


class MaskLabelling(Labelling):
    """Writes the likeliest class of each pixel, void where the teacher is less sure than the class's threshold."""

    beside = {"mask_file_name": "masks", KEY: "soft"}
    takes_soft = True
    palette: Mapping[int, Sequence[int]] | None = None  # of the labelled set

    @property
    def ignore_index(self) -> int:
        """The label of void."""
        return 255 if len(self.id2label) <= SMALL else 65535

    @property
    def labels(self) -> dict[str, Any]:
        colours = class_colours(len(self.id2label), self.palette)
        palette = {str(label): colour.tolist() for label, colour in enumerate(colours)}
        return {**super().labels, "ignore_index": self.ignore_index, "palette": palette}

    @property
    def thresholds(self) -> list[float]:
        """The least confidence of each class."""
        return [self.threshold_of(label, 0.0 if self.choices.soft else THRESHOLD) for label in sorted(self.id2label)]

    @classmethod
    def prior(cls, labels: Iterable[Any], classes: int) -> np.ndarray:
        total = np.zeros(classes)
        for label in labels:
            plain = hard(label).flatten().long()
            total += torch.bincount(plain[(plain >= 0) & (plain < classes)], minlength=classes).numpy()
        return total

    @torch.no_grad()
    def predict(self, outputs: Any, sizes: Sequence[tuple[int, int]], model_type: str) -> list[Prediction]:
        logits = outputs["logits"].float().cpu()
        if logits.ndim != 4 or logits.shape[1] != len(self.id2label):
            raise InputError(
                f"teacher: expected logits [B, {len(self.id2label)}, h, w] of its classes, got {list(logits.shape)}"
            )
        return [self._predicted(*pair) for pair in zip(logits, sizes, strict=True)]

    def _predicted(self, logits: Tensor, size: tuple[int, int]) -> Prediction:
        levels = None
        if self.choices.soft:
            least = [-(-side // SOFT_STRIDE) for side in size]
            grid = [min(own, bound) for own, bound in zip(logits.shape[-2:], least, strict=True)]
            levels = levels_of(interpolate(logits[None], size=grid, mode="area")[0])
            found, sure = likeliest(levels, size)
        else:
            wide = interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]
            best, found = wide.max(0)
            sure = (best - wide.logsumexp(0)).exp()
        kept = sure >= torch.tensor(self.thresholds)[found]
        classes = len(self.id2label)
        amounts = [
            torch.bincount(found.flatten(), weights=weight.flatten().double(), minlength=classes)
            for weight in (torch.ones_like(sure), kept, sure)
        ]
        numbers = torch.stack(amounts, 1)
        facts = {
            "pixels": {str(label): row for label, row in enumerate(numbers.round(decimals=3).tolist()) if row[0]},
            "bins": torch.histc(sure, BINS, 0, 1).int().tolist(),
        }
        files = {"masks": self._png(torch.where(kept, found, self.ignore_index))}
        if levels is not None:
            files["soft"] = to_png(levels)
        return Prediction(files, facts, float(sure.mean()))

    def given(self, label: Any) -> Prediction:
        plain = hard(label).long()
        inside = (plain >= 0) & (plain < len(self.id2label))
        return Prediction({"masks": self._png(torch.where(inside, plain, self.ignore_index))}, {}, 1.0)

    def _png(self, labels: Tensor) -> bytes:
        """A PNG of labels [H, W]: with the classes' colours where a byte holds them."""
        buffer = io.BytesIO()
        if len(self.id2label) <= SMALL:
            picture = Image.fromarray(labels.to(torch.uint8).numpy()).convert("P")
            picture.putpalette(class_colours(len(self.id2label), self.palette).tobytes())
        else:
            picture = Image.fromarray(labels.numpy().astype(np.uint16))
        picture.save(buffer, format="png")
        return buffer.getvalue()

    def summary(self, facts: Sequence[Mapping[str, Any]]) -> Summary:
        classes = len(self.id2label)
        total, bins = np.zeros((classes, 3)), np.zeros(BINS, dtype=np.int64)
        for one in facts:
            bins += np.array(one["bins"])
            for label, row in one["pixels"].items():
                total[int(label)] += row
        predicted, kept, sure = total.T
        prior = predicted if self.priors is None else self.priors
        prior_share, kept_share = (amount / max(amount.sum(), 1) for amount in (prior, kept))
        rows: dict[str, dict[str, float | None]] = {}
        for label, name in sorted(self.id2label.items()):
            there = predicted[label] > 0
            rows[name] = {
                "threshold": self.thresholds[label],
                "confidence": float(sure[label] / predicted[label]) if there else None,
                "predicted": float(predicted[label] / max(predicted.sum(), 1)),
                "kept": float(kept[label] / predicted[label]) if there else None,
                "share": float(kept_share[label]),
                "prior": float(prior_share[label]),
            }
        shares = {name: float(row["share"] or 0) for name, row in rows.items()}
        priors = {name: float(row["prior"] or 0) for name, row in rows.items()}
        warnings = vanished(shares, priors, "all kept pixels")
        return Summary(self.thresholds, rows, warnings, bins.tolist(), "pixels")

    def draw(self, image: Tensor, line: Mapping[str, Any], mask: Tensor | None) -> np.ndarray:
        pixels = image.permute(1, 2, 0).numpy()
        if mask is None:
            return pixels
        colours = class_colours(len(self.id2label), self.palette)
        void = (mask < 0) | (mask >= len(colours))
        painted = 0.35 * pixels + 0.65 * colours[mask.masked_fill(void, 0).numpy()]
        return np.where(void[..., None], pixels // 4, painted).astype(np.uint8)
