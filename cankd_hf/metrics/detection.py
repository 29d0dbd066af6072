"""COCO detection scores, exact for any number of processes: each image is reduced to a small table, without logits."""

import contextlib
import gc
import io
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from cankd_hf.errors import InputError
from cankd_hf.metrics.names import class_keys

PADDING = -100.0  # what the Trainer pads with, too
CROWD, OBJECT, DETECTION = 0.0, 1.0, 2.0
COLUMNS = 7
MAX_DETECTIONS = 100
AREAS = ("all", "small", "medium", "large")
Masks = tuple[tuple[int, int], list[dict[str, Any]]]  # height and width of an image, and run lengths


@torch.no_grad()
def detection_statistics(
    detections: Sequence[Mapping[str, torch.Tensor]],
    targets: Sequence[Mapping[str, torch.Tensor]],
    max_detections: int = MAX_DETECTIONS,
) -> torch.Tensor:
    """Reduce detections and ground truth to one table an image.

    A row is (kind, class, score or area, x0, y0, x1, y1); kind is 2 for a detection, 1 for an object, 0 for a crowd
    region and -100 for padding, with which tables of several batches and processes may be padded further. 100
    detections and 60 objects of one image take 4.5 KB.

    Args:
        detections: for each image `scores` [n], `labels` [n] in 0..K-1 and `boxes` [n, 4] as x0, y0, x1, y1 in pixels
            of the data set's image: the output of `post_process_object_detection`. Detections with a number that is
            not finite are dropped.
        targets: for each image `class_labels` [m], `boxes` [m, 4] in the same pixels, and optionally `area` [m]
            (default: that of the boxes) and `iscrowd` [m] (default: 0). An `image_id` below 0 marks an image that does
            not count; its table is empty.
        max_detections: the best so many of an image are kept.

    Returns:
        float32 [B, max_detections + M, 7], M being the most objects in an image of this batch.

    Raises:
        ValueError: if there are not as many detections as targets.
    """
    if len(detections) != len(targets):
        raise ValueError(f"expected detections for {len(targets)} images, got them for {len(detections)}")
    if not targets:
        return torch.full((0, max_detections, COLUMNS), PADDING)
    rows = [
        torch.cat([found["labels"][:, None].float(), found["scores"][:, None].float(), found["boxes"].float()], 1)
        for found in detections
    ]
    return detection_tables(pad_sequence(rows, batch_first=True, padding_value=torch.nan), targets, max_detections)


@torch.no_grad()
def detection_tables(
    found: torch.Tensor, targets: Sequence[Mapping[str, torch.Tensor]], max_detections: int = MAX_DETECTIONS
) -> torch.Tensor:
    """`detection_statistics` of detections that are one tensor, without waiting for an accelerator.

    Args:
        found: [B, n, 6], class, score and box of each detection; a row with a number that is not finite is none.
        targets: as there, at least one.
        max_detections: as there.
    """
    finite = found.isfinite().all(2)
    order = found[..., 1].where(finite, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :max_detections]
    known = finite.gather(1, order)[..., None]
    rows = found.gather(1, order[..., None].expand(-1, -1, found.shape[2])).where(known, PADDING)
    rows = torch.cat([rows.new_full(known.shape, DETECTION).where(known, PADDING), rows], 2)
    there = pad_sequence([_object_rows(target) for target in targets], batch_first=True, padding_value=PADDING)
    table = torch.cat([pad(rows, (0, 0, 0, max_detections - rows.shape[1]), value=PADDING), there], 1)
    if not any("image_id" in target for target in targets):
        return table
    numbers = [target.get("image_id", target["boxes"].new_zeros(1)) for target in targets]
    counts = torch.stack([torch.as_tensor(number).reshape(()) >= 0 for number in numbers])
    return table.where(counts.to(table.device)[:, None, None], PADDING)


def detection_scores(
    statistics: torch.Tensor | np.ndarray, id2label: dict[int, str], masks: Sequence[Masks] | None = None
) -> dict[str, float]:
    """COCO scores of a whole set, independent of the order of the images.

    Args:
        statistics: [N, R, 7], from `detection_statistics`.
        id2label: names of the K classes.
        masks: of each image its height and width, and the run lengths of all rows of its table that are no padding,
            from `metrics.masks`; None: boxes are scored alone.

    Returns:
        In 0..1, nan for anything absent from the ground truth: `ap` (mean over IoU 0.50:0.05:0.95 and classes),
        `ap50`, `ap75`, `ap_small`, `ap_medium`, `ap_large` (area below 32^2, below 96^2, above), `ar1`, `ar10`,
        `ar100` (recall with so many detections an image), `ar_small`, `ar_medium`, `ar_large`; `ap_agnostic` and
        `ap50_agnostic`, the same with all classes taken as one; `ap_NAME` for each class, see `class_keys`. With masks
        also `mask_ap`, `mask_ap50`, ..., the same of masks.

    Raises:
        ValueError: if the statistics are not [N, R, 7], or hold a class without a name.
        InputError: if neither `faster-coco-eval` nor `pycocotools` is installed.
    """
    tables = statistics.detach().cpu().numpy() if isinstance(statistics, torch.Tensor) else np.asarray(statistics)
    if tables.ndim != 3 or tables.shape[-1] != COLUMNS:
        raise ValueError(f"expected statistics [N, R, {COLUMNS}], got {tables.shape}")
    rows, images, shapes = _sorted_rows(tables, masks)
    classes = rows[:, 1]
    if len(rows) and not (classes.min() >= 0 and classes.max() < len(id2label)):
        raise ValueError(f"expected classes 0..{len(id2label) - 1}, got {classes.min():.0f}..{classes.max():.0f}")
    library, evaluator = _backend()
    scores: dict[str, float] = {}
    for kind, before, outlines in (("bbox", "", None), ("segm", "mask_", shapes))[: 1 if masks is None else 2]:
        with _collector_paused():
            truth = _coco(library, rows, images, len(tables), len(id2label), False, outlines)
            found = _coco(library, rows, images, len(tables), len(id2label), True, outlines)
            own = _scores(partial(evaluator, iouType=kind), truth, found, id2label)
        scores |= {f"{before}{name}": value for name, value in own.items()}
    return scores


def _scores(evaluator: Any, truth: Any, found: Any, id2label: dict[int, str]) -> dict[str, float]:
    """The scores of boxes, or of masks."""
    precision, recall = _evaluate(evaluator, truth, found, by_class=True)
    single, _ = _evaluate(evaluator, truth, found, by_class=False)
    scores = {"ap": _mean(precision[..., 0, -1])}
    scores |= {f"ap{name}": _mean(precision[place, ..., 0, -1]) for place, name in ((0, 50), (5, 75))}
    scores |= {f"ap_{name}": _mean(precision[..., area, -1]) for area, name in enumerate(AREAS) if area}
    scores |= {f"ar{count}": _mean(recall[..., 0, place]) for place, count in enumerate((1, 10, MAX_DETECTIONS))}
    scores |= {f"ar_{name}": _mean(recall[..., area, -1]) for area, name in enumerate(AREAS) if area}
    scores |= {"ap_agnostic": _mean(single[..., 0, -1]), "ap50_agnostic": _mean(single[0, ..., 0, -1])}
    keys = class_keys("ap", id2label, scores)
    return scores | {key: _mean(precision[:, :, index, 0, -1]) for index, key in keys.items()}


def _object_rows(target: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[m, 7] of the ground truth."""
    boxes = target["boxes"].float()
    area = target["area"].float() if "area" in target else (boxes[:, 2:] - boxes[:, :2]).prod(1)
    crowd = target["iscrowd"] if "iscrowd" in target else torch.zeros_like(target["class_labels"])
    kind = torch.where(crowd > 0, CROWD, OBJECT).to(boxes)
    return torch.cat([kind[:, None], target["class_labels"][:, None].to(boxes), area[:, None], boxes], 1)


def _sorted_rows(
    tables: np.ndarray, masks: Sequence[Masks] | None
) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """All rows but padding, [n, 7], their image numbers and their masks, with images sorted by their content."""
    real = [table[table[:, 0] != PADDING] for table in np.ascontiguousarray(tables, dtype=np.float32)]
    given = [((0, 0), [])] * len(real) if masks is None else masks
    shapes = [own[: len(rows)] for rows, (_, own) in zip(real, given, strict=True)]
    keys = [(rows.tobytes(), [one["counts"] for one in own]) for rows, own in zip(real, shapes, strict=True)]
    order = sorted(range(len(real)), key=keys.__getitem__)
    images = np.repeat(np.arange(len(real)), [len(real[place]) for place in order])
    rows = np.concatenate([*(real[place] for place in order), np.zeros((0, COLUMNS), dtype=np.float32)])
    return rows.astype(np.float64), images, [one for place in order for one in shapes[place]]


def _backend() -> tuple[Any, Any]:
    """The classes that hold annotations and that score them."""
    try:
        from faster_coco_eval import COCO, COCOeval_faster

        return COCO, partial(COCOeval_faster, extra_calc=False)
    except ImportError:
        return _slow_backend()


def _slow_backend() -> tuple[Any, Any]:
    """Those of `pycocotools`, with equal results in about seven times the time."""
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        raise InputError(
            "detection scores: expected the package faster-coco-eval (or pycocotools), got neither; "
            "run `pip install faster-coco-eval`"
        ) from None
    return COCO, COCOeval


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Python's search for cycles goes through all objects again and again while many are made."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _coco(
    library: Any,
    rows: np.ndarray,
    images: np.ndarray,
    count: int,
    num_labels: int,
    detected: bool,
    outlines: Sequence[dict[str, Any]] | None = None,
) -> Any:
    """The library's index of the detections, or of the ground truth, with the masks of the rows if they are given."""
    chosen = (rows[:, 0] == DETECTION) == detected
    rows = rows[chosen]
    shapes = None if outlines is None else [outlines[place] for place in np.flatnonzero(chosen).tolist()]
    boxes = np.concatenate([rows[:, 3:5], rows[:, 5:7] - rows[:, 3:5]], 1)
    area = boxes[:, 2] * boxes[:, 3] if detected else rows[:, 2]
    if detected and shapes:
        area = pixels_of(shapes)
    classes, crowd = rows[:, 1].astype(int), (rows[:, 0] == CROWD).astype(int)
    columns = (images[chosen], classes, boxes, area, crowd, rows[:, 2])
    # ids begin at 1: both libraries take 0 for "matched with nothing"
    annotations = [
        {
            "id": number,
            "image_id": image,
            "category_id": label,
            "bbox": box,
            "area": size,
            "iscrowd": many,
            "score": score,
        }
        for number, (image, label, box, size, many, score) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True), start=1
        )
    ]
    sizes = dict.fromkeys(range(count), (0, 0))
    for entry, shape in zip(annotations, shapes or (), strict=shapes is not None):
        entry["segmentation"], sizes[entry["image_id"]] = dict(shape), shape["size"]
    index = library()
    index.dataset = {
        "images": [{"id": number, "height": size[0], "width": size[1]} for number, size in sizes.items()],
        "annotations": annotations,
        "categories": [{"id": number, "name": str(number)} for number in range(num_labels)],
    }
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        index.createIndex()
    return index


def pixels_of(shapes: Sequence[dict[str, Any]]) -> np.ndarray:
    """The pixels [n] of masks, from their run lengths."""
    try:
        from faster_coco_eval.core import mask
    except ImportError:
        from pycocotools import mask
    return np.asarray(mask.area(list(shapes)), np.float64)


def _evaluate(evaluator: Any, truth: Any, found: Any, by_class: bool) -> tuple[np.ndarray, np.ndarray]:
    """Precision [IoU, recall step, class, area, detections] and recall, the same without steps; -1: no ground
    truth. With all classes taken as one there is one area, all, and one number of detections, the last."""
    with contextlib.redirect_stdout(io.StringIO()):
        run = evaluator(truth, found)
        run.params.useCats = int(by_class)
        if not by_class:
            run.params.maxDets, run.params.areaRng = run.params.maxDets[-1:], run.params.areaRng[:1]
            run.params.areaRngLbl = run.params.areaRngLbl[:1]
        run.evaluate()
        run.accumulate()
    return np.asarray(run.eval["precision"]), np.asarray(run.eval["recall"])


def _mean(values: np.ndarray) -> float:
    """Mean over what has a ground truth, else nan."""
    known = values[values > -1]
    return float(known.mean()) if len(known) else float("nan")
