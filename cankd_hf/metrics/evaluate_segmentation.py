"""The segmentation scores as an `evaluate.Metric`, for those who use that library.

Nothing of cankd_hf imports this module: `evaluate` takes seconds to import and is an optional dependency.
"""

from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from cankd_hf.metrics.segmentation import prediction_areas, segmentation_scores

DESCRIPTION = "Mean IoU, per-class IoU, pixel accuracy and mean accuracy over a whole set, from areas per class."
CITATION = """@article{everingham2010pascal,
  title={The Pascal Visual Object Classes (VOC) Challenge},
  author={Everingham, Mark and Van Gool, Luc and Williams, Christopher K. I. and Winn, John and Zisserman, Andrew},
  journal={International Journal of Computer Vision}, volume={88}, pages={303--338}, year={2010}
}"""
INPUTS = """
Args:
    predictions: class maps, one [H, W] an image.
    references: label maps of the same sizes.
    num_labels: number of classes.
    ignore_index: label that does not count (255).
    id2label: names of the classes; default: their numbers.
"""


class SegmentationMetric(evaluate.Metric):
    """`SegmentationMetric().compute(predictions=..., references=..., num_labels=K)`; see `segmentation_scores`."""

    def _info(self) -> evaluate.MetricInfo:
        maps = datasets.Sequence(datasets.Sequence(datasets.Value("int32")))
        features = datasets.Features({"predictions": maps, "references": maps})
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation=CITATION, inputs_description=INPUTS, features=features
        )

    def _compute(  # type: ignore[override]
        self,
        predictions: Any,
        references: Any,
        num_labels: int,
        ignore_index: int = 255,
        id2label: dict[int, str] | None = None,
    ) -> dict[str, float]:
        names = id2label or {index: str(index) for index in range(num_labels)}
        pairs = zip(predictions, references, strict=True)
        areas = [prediction_areas(_tensor(one), _tensor(two), num_labels, ignore_index) for one, two in pairs]
        return segmentation_scores(torch.stack(areas), names)


def _tensor(values: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.int64))
