"""How the teacher's classes on unlabelled images compare with the labels: a rare class that it never finds there is
unlearned from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from cankd_hf.teachers.teacher import TeacherOutput

RARE = 0.1  # of a class's share among the labels; below it a class counts as vanished
ENOUGH = 5  # batches that are looked at before anything is said


class ClassShares:
    """Counts, in the batches whose similarity is measured, the pixels of each class: as labelled, and as answered by
    the teacher on unlabelled images.

    Args:
        names: of the classes.
        ignore_index: label of void.
    """

    def __init__(self, names: Sequence[str], ignore_index: int) -> None:
        self.names, self.ignore_index = list(names), ignore_index
        self.batches = 0
        self._counts: Tensor | None = None  # [2, K]: labelled, answered
        self._said = False

    @torch.no_grad()
    def see(self, outputs: Mapping[str, TeacherOutput], labels: Tensor, meta: Mapping[str, Tensor]) -> None:
        """Counts a batch with masks [B, H, W]; the answer is that of the first teacher with logits of the classes."""
        count = len(self.names)
        found = (one.logits for one in outputs.values() if one.logits is not None and one.logits.ndim == 4)
        logits = next((one for one in found if one.shape[1] == count), None)
        if logits is None:
            return
        answers = logits.argmax(1)
        unlabelled = ~meta["labelled"].to(answers.device)[:, None, None].expand_as(answers)
        if "valid" in meta:
            valid = functional.interpolate(meta["valid"][:, None].float(), answers.shape[-2:])[:, 0] > 0
            unlabelled = unlabelled & valid
        counted = (labels != self.ignore_index) & (labels >= 0) & (labels < count)
        now = torch.stack([_counted(labels, counted, count), _counted(answers, unlabelled, count)])
        self._counts = now if self._counts is None else self._counts + now
        self.batches += 1

    def shares(self) -> dict[str, float]:
        """For each class with labels, its share of the answers by its share of the labels, by name."""
        if self._counts is None:
            return {}
        parts = self._counts.double() / self._counts.sum(1, keepdim=True).clamp(min=1)
        return {
            name: answered / labelled
            for name, labelled, answered in zip(self.names, *parts.tolist(), strict=True)
            if labelled > 0
        }

    def vanished(self) -> str | None:
        """A warning, once, of classes that the teacher hardly finds in the unlabelled images."""
        if self._said or self.batches < ENOUGH:
            return None
        lost = {name: share for name, share in self.shares().items() if share < RARE}
        if not lost:
            return None
        self._said = True
        told = ", ".join(f"{name} {share:.2g}" for name, share in sorted(lost.items(), key=lambda item: item[1])[:10])
        return (
            f"data.unlabelled: the teacher finds classes less than {RARE:g} times as often there as they are labelled "
            f"({told}): these images teach that they are none; add images with them, or lower the terms' weights"
        )


def _counted(values: Tensor, where: Tensor, count: int) -> Tensor:
    """How often each of the values 0..count - 1 occurs where `where` holds, int64 [count]; nobody waits for it."""
    places = torch.where(where, values, 0).flatten()
    zeros = torch.zeros(count, dtype=torch.int64, device=values.device)
    return zeros.scatter_add_(0, places, where.flatten().to(torch.int64))
