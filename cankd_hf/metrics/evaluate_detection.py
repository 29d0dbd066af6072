"""The detection scores as an `evaluate.Metric`; like `evaluate_adapter`, imported by nothing of cankd_hf."""

from typing import Any

import datasets
import evaluate
import torch

from cankd_hf.metrics.detection import detection_scores, detection_statistics

DESCRIPTION = "COCO AP and AR by size and class, and AP with all classes taken as one."
CITATION = """@inproceedings{lin2014microsoft,
  title={Microsoft {COCO}: Common Objects in Context},
  author={Lin, Tsung-Yi and Maire, Michael and Belongie, Serge and Hays, James and Perona, Pietro and
          Ramanan, Deva and Doll{\\'a}r, Piotr and Zitnick, C. Lawrence},
  booktitle={ECCV}, year={2014}
}"""
INPUTS = """
Args:
    predictions: for each image `scores` [n], `labels` [n] and `boxes` [n, 4] as x0, y0, x1, y1 in pixels.
    references: for each image `class_labels` [m], `boxes` [m, 4] in the same pixels, `area` [m] and `iscrowd` [m].
    id2label: names of the classes 0..K-1.
"""
TYPES = {"scores": "float32", "labels": "int32", "class_labels": "int32", "area": "float32", "iscrowd": "int32"}


class DetectionMetric(evaluate.Metric):
    """`DetectionMetric().compute(predictions=..., references=..., id2label=...)`; see `detection_scores`."""

    def _info(self) -> evaluate.MetricInfo:
        values = {key: datasets.Sequence(datasets.Value(kind)) for key, kind in TYPES.items()}
        values["boxes"] = datasets.Sequence(datasets.Sequence(datasets.Value("float32")))
        features = datasets.Features(
            {
                "predictions": {key: values[key] for key in ("scores", "labels", "boxes")},
                "references": {key: values[key] for key in ("class_labels", "boxes", "area", "iscrowd")},
            }
        )
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation=CITATION, inputs_description=INPUTS, features=features
        )

    def _compute(  # type: ignore[override]
        self, predictions: Any, references: Any, id2label: dict[int, str]
    ) -> dict[str, float]:
        found, there = ([_tensors(image) for image in images] for images in (predictions, references))
        return detection_scores(detection_statistics(found, there), id2label)


def _tensors(image: dict[str, Any]) -> dict[str, torch.Tensor]:
    """One image's lists as tensors; no boxes are [0, 4]."""
    tensors = {key: torch.as_tensor(value) for key, value in image.items()}
    return tensors | {"boxes": tensors["boxes"].float().reshape(-1, 4)}
