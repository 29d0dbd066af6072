"""Masks from a teacher's logits."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

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
KEEP = 0.5  # of the pixels of each class, at the least
FINE = 1000  # bins of the confidence by which thresholds are found
BINS = 20
SOFT_STRIDE = 4  # finest grid of stored probabilities
SMALL = 255  # classes up to which a mask is a byte a pixel, with 255 as void


class MaskLabelling(Labelling):
    """Writes the likeliest class of each pixel, void where the teacher is less sure than the class's threshold.

    One threshold for all classes loses the rare ones, of which a teacher is never as sure: so the threshold of a class
    is at most the confidence above which `Choices.keep` of its own pixels lie (as in class-balanced self-training,
    arXiv:1810.07911, for which docs/label.md has the numbers).
    """

    beside: ClassVar[Mapping[str, str]] = {"mask_file_name": "masks", KEY: "soft"}
    takes_soft: ClassVar[bool] = True

    @property
    def settings(self) -> list[Any]:
        return [self.thresholds, self.choices.soft]

    @property
    def cap(self) -> float:
        """The threshold of all classes."""
        given = self.choices.threshold
        return (0.0 if self.choices.soft else THRESHOLD) if given is None else given

    @property
    def keep(self) -> float:
        """The least share of each class's pixels that is kept."""
        return KEEP if self.choices.keep is None else self.choices.keep

    @property
    def looks_first(self) -> bool:
        return self.keep > 0 and self.cap > 0

    @torch.no_grad()
    def look(self, outputs: Any, sizes: Sequence[tuple[int, int]]) -> None:
        for logits, size in zip(self._logits(outputs), sizes, strict=True):
            found, sure, _ = self._likeliest(logits, size)
            cells = found * FINE + (sure * FINE).long().clamp(max=FINE - 1)
            self.seen += torch.bincount(cells.flatten(), minlength=self.seen.numel()).view_as(self.seen)

    def seen_so_far(self) -> list[list[int]]:
        seen: list[list[int]] = self.seen.tolist()
        return seen

    def take(self, seen: list[list[int]]) -> None:
        self.seen = torch.tensor(seen)

    def _floor(self, label: int) -> float:
        """The threshold of a class: that of all, or less where too little of the class would be kept."""
        if not self.looks_first:
            return self.cap
        above = self.seen.flip(1).cumsum(1)  # pixels of at least that confidence, the surest first
        wanted = self.keep * above[:, -1:]
        bins = (above < wanted).sum(1) + 1  # from the top, that hold them
        floors = (1 - bins.double() / FINE).clamp(max=self.cap)
        known = above[:, -1] > 0
        if not known.any():
            return self.cap
        # of a class that was not seen as little is asked as of the least certain one
        return round(float(floors[label] if known[label] else floors[known].min()), 3)

    @cached_property
    def seen(self) -> Tensor:
        """Pixels by class and confidence in what `look` was given, [K, FINE]."""
        return torch.zeros(len(self.id2label), FINE, dtype=torch.int64)

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
        names = self.choices.thresholds
        return [names.get(self.id2label[label], self._floor(label)) for label in sorted(self.id2label)]

    @classmethod
    def prior(cls, labels: Iterable[Any], classes: int) -> np.ndarray:
        total = np.zeros(classes)
        for label in labels:
            plain = hard(label).flatten().long()
            total += torch.bincount(plain[(plain >= 0) & (plain < classes)], minlength=classes).numpy()
        return total

    @torch.no_grad()
    def predict(self, outputs: Any, sizes: Sequence[tuple[int, int]], model_type: str) -> list[Prediction]:
        thresholds = torch.tensor(self.thresholds)
        return [self._predicted(*one, thresholds) for one in zip(self._logits(outputs), sizes, strict=True)]

    def _logits(self, outputs: Any) -> Tensor:
        """The logits [B, K, h, w] in a model's outputs. Raises InputError for any others."""
        logits: Tensor = outputs["logits"].float()
        if logits.ndim != 4 or logits.shape[1] != len(self.id2label):
            raise InputError(
                f"teacher: expected logits [B, {len(self.id2label)}, h, w] of its classes, got {list(logits.shape)}"
            )
        return logits

    def _likeliest(self, logits: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor | None]:
        """The likeliest class of each pixel, its probability, and the probabilities to store."""
        if self.choices.soft:
            least = [-(-side // SOFT_STRIDE) for side in size]
            grid = [min(own, bound) for own, bound in zip(logits.shape[-2:], least, strict=True)]
            levels = levels_of(interpolate(logits[None], size=grid, mode="area")[0]).cpu()
            return *likeliest(levels, size), levels
        wide = interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]
        best, found = wide.max(0)
        return found.cpu(), (best - wide.logsumexp(0)).exp().cpu(), None

    def _predicted(self, logits: Tensor, size: tuple[int, int], thresholds: Tensor) -> Prediction:
        found, sure, levels = self._likeliest(logits, size)
        kept = sure >= thresholds[found]
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
            # of all 256 colours: with fewer, Pillow would write fewer bits a pixel, and cut void
            picture.putpalette(class_colours(len(self.id2label), self.palette).tobytes().ljust(3 * 256, b"\0"))
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
        thresholds = self.thresholds
        prior = predicted if self.priors is None else self.priors
        prior_share, kept_share = (amount / max(amount.sum(), 1) for amount in (prior, kept))
        rows: dict[str, dict[str, float | None]] = {}
        for label, name in sorted(self.id2label.items()):
            there = predicted[label] > 0
            rows[name] = {
                "threshold": thresholds[label],
                "confidence": float(sure[label] / predicted[label]) if there else None,
                "predicted": float(predicted[label] / max(predicted.sum(), 1)),
                "kept": float(kept[label] / predicted[label]) if there else None,
                "share": float(kept_share[label]),
                "prior": float(prior_share[label]),
            }
        shares = {name: float(row["share"] or 0) for name, row in rows.items()}
        priors = {name: float(row["prior"] or 0) for name, row in rows.items()}
        warnings = vanished(shares, priors, "all kept pixels")
        return Summary(thresholds, rows, warnings, bins.tolist(), "pixels")

    def draw(self, image: Tensor, line: Mapping[str, Any], mask: Tensor | None) -> np.ndarray:
        pixels = image.permute(1, 2, 0).numpy()
        if mask is None:
            return pixels
        colours = class_colours(len(self.id2label), self.palette)
        void = (mask < 0) | (mask >= len(colours))
        painted = 0.35 * pixels + 0.65 * colours[mask.masked_fill(void, 0).numpy()]
        return np.where(void[..., None], pixels // 4, painted).astype(np.uint8)
