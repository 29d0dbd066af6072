"""`python -m cankd_hf.benchmark scoring --kind boxes`: COCO scores from outputs, against a loop of records."""

import contextlib
import io
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from transformers import DeformableDetrImageProcessor
from transformers.utils import ModelOutput

from cankd_hf.benchmark.measure import against_plain, table
from cankd_hf.data.detection.collate import detection_collate
from cankd_hf.errors import InputError
from cankd_hf.metrics.detection import MAX_DETECTIONS, _backend
from cankd_hf.tasks import TASKS

BATCH, QUERIES, MOST = 8, 100, 14
Batch = tuple[ModelOutput, dict[str, Any]]


def run_boxes(images: int, classes: int, size: Sequence[int], repeats: int, device: str, console: Console) -> float:
    """Prints seconds to score random detections, 100 queries an image; returns the ratio to the plain form.

    CPU time of one thread on the CPU, wall-clock on an accelerator. Raises InputError if the scores differ.
    """
    place = torch.device(device)
    batches = _material(images, classes, size, place)
    made: Any = TASKS["detection"]
    task = made({number: str(number) for number in range(classes)})
    student: Any = SimpleNamespace(config=SimpleNamespace(model_type="deformable_detr"))

    def ours() -> dict[str, float]:
        tables = [task.statistics({"outputs": outputs}, inputs, student) for outputs, inputs in batches]
        most = max(one.shape[1] for one in tables)
        padded = [torch.nn.functional.pad(one, (0, 0, 0, most - one.shape[1]), value=-100.0) for one in tables]
        scores: dict[str, float] = task.scores(torch.cat(padded).cpu().numpy())
        return scores

    def plain() -> dict[str, float]:
        return _plain(batches, classes)

    found, expected = ours(), plain()
    if any(not abs(found[name] - value) < 1e-6 for name, value in expected.items()):
        raise InputError("scoring: expected the plain form's scores, got others; report the sizes")
    name = f"{images} images, {QUERIES} boxes each, {classes} classes"
    ratio, row = against_plain(ours, plain, repeats, place, name)
    title = f"COCO scores from a detector's outputs on {device}; those of both are the same"
    console.print(table(title, ("scored", "ours", "plain", "ratio"), [row]))
    return ratio


def _material(images: int, classes: int, size: Sequence[int], device: torch.device) -> list[Batch]:
    """Outputs around the objects of random images, and their labels."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for first in range(0, images, BATCH):
        samples, outputs = [], []
        for _ in range(min(BATCH, images - first)):
            count = int(torch.randint(1, MOST, (), generator=generator))
            sides = 0.02 + 0.3 * torch.rand(count, 2, generator=generator) ** 2
            boxes = torch.cat([0.1 + 0.8 * torch.rand(count, 2, generator=generator), sides], 1)
            labels = torch.randint(0, classes, (count,), generator=generator)
            area = sides.prod(1) * size[0] * size[1]
            whole = torch.tensor(list(size))
            sample = {"class_labels": labels, "boxes": boxes, "area": area, "iscrowd": torch.zeros_like(labels)}
            sample |= {"image_id": torch.tensor([0]), "orig_size": whole, "size": whole}
            samples.append({"pixel_values": torch.zeros(3, *size), "labels": sample})
            which = torch.randint(0, count, (QUERIES,), generator=generator)
            guessed = boxes[which] + 0.02 * torch.randn(QUERIES, 4, generator=generator)
            guessed[:, 2:].clamp_(min=0.01)
            logits = torch.randn(QUERIES, classes, generator=generator) - 4
            logits[torch.arange(QUERIES), labels[which]] += 6 * torch.rand(QUERIES, generator=generator)
            outputs.append((logits, guessed))
        logits, guessed = (torch.stack(part).to(device) for part in zip(*outputs, strict=True))
        inputs = detection_collate(samples)
        inputs["pixel_values"] = torch.empty(len(samples), 3, *size)
        inputs["labels"] = [{key: value.to(device) for key, value in label.items()} for label in inputs["labels"]]
        batches.append((ModelOutput(logits=logits, pred_boxes=guessed), inputs))
    return batches


def _plain(batches: list[Batch], classes: int) -> dict[str, float]:
    """The image processor of transformers, a record for each box in a loop, `loadRes`, and two evaluations."""
    library, evaluator = _backend()
    processor: Any = DeformableDetrImageProcessor()
    records, objects, images = list[Any](), list[Any](), 0
    for outputs, inputs in batches:
        sizes = torch.stack([label["orig_size"] for label in inputs["labels"]])
        made = processor.post_process_object_detection(
            outputs, threshold=0.0, target_sizes=sizes, top_k=MAX_DETECTIONS
        )
        for found, label, full in zip(made, inputs["labels"], sizes.flip(1).tolist(), strict=True):
            for score, kind, box in zip(
                found["scores"], found["labels"], _corner_and_sides(found["boxes"]), strict=True
            ):
                records.append({"image_id": images, "category_id": kind.item(), "bbox": box, "score": score.item()})
            scale = label["boxes"].new_tensor(full * 2)
            centre, sides = label["boxes"][:, :2], label["boxes"][:, 2:]
            there = torch.cat([centre - sides / 2, centre + sides / 2], 1) * scale
            for kind, box, area in zip(label["class_labels"], _corner_and_sides(there), label["area"], strict=True):
                one = {"id": len(objects) + 1, "image_id": images, "category_id": kind.item(), "bbox": box}
                objects.append({**one, "area": area.item(), "iscrowd": 0})
            images += 1
    truth = library()
    names = [{"id": number, "name": str(number)} for number in range(classes)]
    truth.dataset = {"images": [{"id": i} for i in range(images)], "annotations": objects, "categories": names}
    precisions = []
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        guessed = truth.loadRes(records)
        for by_class in (1, 0):
            run = evaluator(truth, guessed, iouType="bbox")
            run.params.useCats = by_class
            run.evaluate()
            run.accumulate()
            precisions.append(np.asarray(run.eval["precision"])[..., 0, -1])
    ap, agnostic = (float(values[values > -1].mean()) for values in precisions)
    return {"ap": ap, "ap_agnostic": agnostic}


def _corner_and_sides(boxes: Tensor) -> list[list[float]]:
    """Corners [n, 4] as COCO has boxes: left, top, width, height."""
    left, top, right, bottom = boxes.double().unbind(1)
    return torch.stack([left, top, right - left, bottom - top], 1).tolist()
