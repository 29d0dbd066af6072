"""Monocular depth estimation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForDepthEstimation, BaseImageProcessor, DPTImageProcessor, PreTrainedModel

from cankd_hf.config.data import DataConfig, DepthConfig
from cankd_hf.config.student import StudentConfig
from cankd_hf.data.common.batch import takes_bytes
from cankd_hf.data.common.dataset import Transform
from cankd_hf.data.common.opening import SplitCatalog
from cankd_hf.data.common.sources import ROLES, TaskData
from cankd_hf.data.depth.expected import depth_problem
from cankd_hf.data.depth.load import load_depth, open_depth
from cankd_hf.data.segmentation.collate import segmentation_collate
from cankd_hf.data.segmentation.transforms import EvalTransform
from cankd_hf.errors import InputError
from cankd_hf.metrics.depth import aligned, depth_scores, depth_sums, image_abs_rel, resized, wide
from cankd_hf.models.depth import depth_kind, with_loss
from cankd_hf.models.students import build_student, load_student
from cankd_hf.tasks.base import Metric, Task, stretched, trusted
from cankd_hf.tasks.depth_pictures import DepthOverview, painted, with_scale
from cankd_hf.tasks.export_forms import ExportForm
from cankd_hf.tasks.showing import ImageScores
from cankd_hf.tasks.starting import DEPTH

# Fields of a model's configuration that `data.depth` decides.
DECIDED = ("depth_kind", "depth_loss", "max_depth", "depth_estimation_type")


class DepthTask(Task):
    """Tells how far every pixel is; scored by the absolute relative error over all pixels of the data set.

    Args:
        config: the `data.depth` section.
    """

    name = "depth"
    metric = "abs_rel"
    greater_is_better = False
    metrics = {
        "abs_rel": Metric("abs_rel", "Absolute relative error", "AbsRel"),
        "rmse": Metric("rmse", "RMSE in metres"),
        "delta1": Metric("delta1", "delta < 1.25"),
        "delta2": Metric("delta2", "delta < 1.25^2"),
        "delta3": Metric("delta3", "delta < 1.25^3"),
    }
    further_scores = ("sq_rel", "rmse_log", "log10", "image_")
    pipeline_tag = "depth-estimation"
    label_kind, overview, starter = "depths", DepthOverview, DEPTH
    takes_labels = True
    ignore_index = 0  # of pixels without a depth
    pictured = True
    picture_note = "near is red, far is blue, in the range of the true depth; relative depth is fitted to it"

    def __init__(self, config: DepthConfig | None = None) -> None:
        self.config = config or DepthConfig()

    # Models

    @classmethod
    def recognises(cls, architecture: str) -> bool:
        return "DepthEstimation" in architecture

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> DepthTask:
        config = with_loss(model).config.to_dict()
        kind, limit = depth_kind(config), config.get("max_depth")
        bounded = kind == "metric" and isinstance(limit, (int, float)) and limit > 1
        return cls(DepthConfig(kind=kind, max=float(limit) if bounded else None))  # type: ignore[arg-type]

    def for_model(self, model: PreTrainedModel) -> DepthTask:
        with_loss(model)
        return self

    @classmethod
    def open_data(cls, config: DataConfig) -> SplitCatalog:
        return open_depth(config)

    def build_student(self, config: StudentConfig) -> PreTrainedModel:
        for place, given in (("student.fpn", config.fpn), ("student.config", config.config or {})):
            if told := [key for key in DECIDED if key in given]:
                raise InputError(f"{place}.{told[0]}: data.depth decides it; set data.depth.kind, .loss or .max there")
        kind, limit = self.config.kind, self.config.max
        settings: dict[str, Any] = {"depth_kind": kind}
        settings |= {"depth_loss": self.config.loss} if self.config.loss is not None else {}
        native = (config.config or {}).get("model_type")
        if native == "depth_anything" or (config.model is not None and _has(config, "depth_estimation_type")):
            settings["depth_estimation_type"] = kind
        if limit is not None and kind == "metric":
            settings["max_depth"] = int(limit) if native and limit == int(limit) else limit
        model = build_student(config, AutoModelForDepthEstimation, {}, None, fewest=0, settings=settings)
        return with_loss(model)

    @classmethod
    def load(cls, folder: str | Path, revision: str | None = None) -> PreTrainedModel:
        return with_loss(load_student(AutoModelForDepthEstimation, folder, revision, cls.name))

    def image_processor(self, config: DataConfig) -> BaseImageProcessor:
        return DPTImageProcessor(**stretched(config), keep_aspect_ratio=False, ensure_multiple_of=1)

    # Data

    @classmethod
    def from_data(
        cls, config: DataConfig, labelled: bool = True, splits: Sequence[str] = ROLES
    ) -> tuple[DepthTask, TaskData]:
        cls.check_labelled(labelled)
        return cls(config.depth), load_depth(config, splits)

    @classmethod
    def eval_transform(cls, config: DataConfig) -> Transform:
        return EvalTransform(config)

    @takes_bytes
    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return segmentation_collate(list(samples), self.ignore_index)

    def label_problem(self, labels: Any, size: tuple[int, int], scored: bool) -> str | None:
        return depth_problem(labels, size, scored)

    def model_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        kept = dict(inputs)
        # Depth maps of several sizes, padded to one, do not match their images: they can be scored, but give no loss.
        if kept.pop("label_sizes", None) is not None:
            kept.pop("labels")
        return kept

    # Evaluation

    def statistics(self, outputs: Mapping[str, Any], inputs: Mapping[str, Any], student: PreTrainedModel) -> Tensor:
        return depth_sums(
            outputs["outputs"]["predicted_depth"],
            inputs["labels"],
            depth_kind(student.config.to_dict()) == "relative",
            self.config.max,
            inputs.get("label_sizes"),
        )

    def scores(self, statistics: np.ndarray) -> dict[str, float]:
        return depth_scores(statistics)

    def why_not_scored(self, model: PreTrainedModel) -> str | None:
        kind = depth_kind(model.config.to_dict())
        if kind == self.config.kind:
            return None
        return f"it predicts {kind} depth and the student {self.config.kind} depth, whose scores do not compare"

    def image_scores(self, statistics: Any) -> ImageScores:
        return ImageScores("AbsRel of the image", image_abs_rel(statistics), self.greater_is_better)

    # Pictures

    @torch.no_grad()
    def answer(self, model: PreTrainedModel, pixel_values: Tensor, **settings: Any) -> Any:
        found = model(pixel_values=pixel_values[None].to(model.device, model.dtype)).predicted_depth[0].float().cpu()
        return found, depth_kind(model.config.to_dict()) == "relative"

    def truth(self, sample: Mapping[str, Any]) -> Any:
        return torch.as_tensor(sample["labels"]).float(), False

    def metres(self, answer: Any, truth: Any) -> Tensor:
        """An answer in metres at the size of the truth [H, W]; a relative one aligned to it, as it is scored."""
        (values, relative), known = answer, wide(truth[0])
        found = resized(values, (known.shape[0], known.shape[1]))
        return aligned(found, known, known > 0, self.config.max) if relative else found

    def paint(self, image: np.ndarray, answer: Any, truth: Any) -> np.ndarray:
        if answer is truth:
            return with_scale(truth[0].numpy())
        return painted(self.metres(answer, truth).numpy(), truth[0].numpy())

    def caption(self, answer: Any, truth: Any) -> str:
        if answer is truth:
            known = truth[0][truth[0] > 0]
            return f"{float(known.min()):.3g} to {float(known.max()):.3g} m" if len(known) else "no depth"
        sums = depth_sums(answer[0][None], truth[0][None], answer[1], self.config.max)
        fitted = ", scale and shift fitted" if answer[1] else ""
        return f"AbsRel {float(image_abs_rel(sums.numpy())[0]):.3f}{fitted}"

    # The card

    @classmethod
    def purpose(cls, config: Mapping[str, Any], size: str, source: str) -> str:
        what = "the distance of every pixel of an image in metres"
        if depth_kind(config) == "relative":
            what = "for every pixel of an image how near it is, up to an unknown scale and shift"
        return f"A depth model{size} that tells {what}, {source}."

    @classmethod
    def usage(cls, config: Mapping[str, Any], name: str) -> tuple[str, str]:
        before, trust, note = trusted(config)
        code = (
            f"{before}from transformers import pipeline\n\n"
            f'predict = pipeline("{cls.pipeline_tag}", {json.dumps(name)}{trust})\n'
            'found = predict("photo.jpg")\n'
            'print(found["predicted_depth"].shape, found["depth"].size)'
        )
        return code, note

    @classmethod
    def quick_usage(cls, config: Mapping[str, Any], folder: str) -> str:
        ours = "import cankd_hf  # or trust_remote_code=True where it is not installed\n"
        return (
            f"{ours if config['model_type'] == 'cankd_fpn' else ''}from transformers import pipeline\n"
            f'pipeline("{cls.pipeline_tag}", {json.dumps(folder)})("photo.jpg")["depth"]'
        )

    @classmethod
    def limits(cls, config: Mapping[str, Any]) -> list[str]:
        if depth_kind(config) == "relative":
            return [
                "It predicts inverse depth up to a scale and a shift that differ between images: larger is nearer. "
                "Its scores are those after the best fit of both to the true depth of each image."
            ]
        said = "Its metres hold for cameras with the field of view of the training images; others see other sizes."
        limit = config.get("max_depth")
        return [said, *([f"It predicts at most {limit:g} m."] if isinstance(limit, (int, float)) else [])]

    # Export

    @classmethod
    def export_form(cls, model: PreTrainedModel, size: tuple[int, int]) -> ExportForm:
        relative = depth_kind(model.config.to_dict()) == "relative"
        unit = "inverse depth up to scale and shift, larger is nearer" if relative else "metres"
        return ExportForm(model, {"predicted_depth": f"[B, h, w] float32, {unit}; resize to the image"})


def _has(config: StudentConfig, field: str) -> bool:
    """Whether the configuration of a saved model has a field."""
    from cankd_hf.models.backbones import load_config

    hub = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    return field in load_config(str(config.model), hub).to_dict()
