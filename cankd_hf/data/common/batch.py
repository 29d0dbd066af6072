"""Collation: stacking tensors of several sizes, and batches that carry metadata about their samples."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from cankd_hf.errors import InputError

META = "meta"


def stack_padded(tensors: Sequence[Tensor], fill: float, multiple: int = 1) -> Tensor:
    """Stack [..., h, w] tensors, padded at the right and the bottom to the largest, rounded up to a multiple."""
    height, width = (-(-max(tensor.shape[side] for tensor in tensors) // multiple) * multiple for side in (-2, -1))
    return torch.stack(
        [
            tensor
            if tensor.shape[-2:] == (height, width)
            else pad(tensor, (0, width - tensor.shape[-1], 0, height - tensor.shape[-2]), value=fill)
            for tensor in tensors
        ]
    )


class Repeated(NamedTuple):
    """A sample that fills up a batch where a stream ended early for this process; it is not scored."""

    sample: Any


class Batch(dict[str, Any]):
    """A mapping, as the `Trainer` and `accelerate` expect a batch to be, in two parts.

    `inputs` goes to the model. `meta` never does; it holds for each of the B samples:

    - `sample`: its index in the training set, int64 [B]; -1 where the set does not number its samples (evaluation,
      streams).
    - `view`: the number of its augmentation, int64 [B]: the epoch. Seed, view and sample determine the augmentation.
    - `labelled`: whether it has labels, bool [B].
    - `repeated`: whether it only fills up the batch, see `Repeated`, bool [B].
    """

    @property
    def inputs(self) -> dict[str, Any]:
        """The model's inputs by name."""
        return {name: value for name, value in self.items() if name != META}

    @property
    def meta(self) -> dict[str, Tensor]:
        """Metadata of the samples; empty for a batch that was not made by `BatchCollator`."""
        return self.get(META, {})


class BatchCollator:
    """Collates samples into a `Batch`; `collate` makes the model's inputs of samples without their `meta`."""

    def __init__(self, collate: Callable[[list[Any]], Mapping[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, samples: Sequence[Any]) -> Batch:
        repeated = [isinstance(sample, Repeated) for sample in samples]
        samples = [item.sample if isinstance(item, Repeated) else item for item in samples]
        known = [dict(sample) if isinstance(sample, Mapping) else {} for sample in samples]
        metas = [sample.pop(META) if isinstance(sample.get(META), tuple) else (-1, 0) for sample in known]
        known = [{**item, META: own[0]} if own else item for item, (_, _, *own) in zip(known, metas, strict=True)]
        try:
            inputs = self.collate([sample or given for sample, given in zip(known, samples, strict=True)])
        except (RuntimeError, ValueError, TypeError) as error:
            shapes = {str(list(getattr(sample.get("pixel_values"), "shape", ()))) for sample in known}
            if len(shapes) < 2 or isinstance(error, InputError):
                raise
            said = f"{', '.join(sorted(shapes))}: {' '.join(str(error).split())[:200]}"
            raise InputError(
                f"data_collator: expected images that it puts into one batch, got the shapes {said}; resize or pad "
                "them alike"
            ) from error
        meta = {
            "sample": torch.tensor([sample for sample, *_ in metas]),
            "view": torch.tensor([view for _, view, *_ in metas]),
            "labelled": torch.tensor([sample.get("labels") is not None for sample in known]),
            "repeated": torch.tensor(repeated),
        }
        return Batch({**inputs, META: meta})
