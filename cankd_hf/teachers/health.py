"""What is wrong with a teacher, in plain sentences for the log, the dry run, the result table and the card."""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cankd_hf.names import RANDOM_WEIGHTS, TEACHER
from cankd_hf.teachers.teacher import Teacher, TeacherOutput

logger = logging.getLogger(__name__)

# Largest change of any channel, relative to its largest value, up to which a map counts as constant.
CONSTANT = 1e-3


def title(name: str) -> str:
    """What messages call a teacher: `teacher`, or `teacher NAME` of several."""
    return TEACHER if name == TEACHER else f"{TEACHER} {name}"


def untrained(name: str, teacher: Teacher) -> list[str]:
    """Whether the weights are random, which is fine only for one that a run trains first (`fit`)."""
    random = teacher.name == RANDOM_WEIGHTS or _norms_as_initialised(teacher.model)
    if not random or teacher.config.fit is not None:
        return []
    return [f"{title(name)}: its weights are random, never trained; what a student learns from it is noise"]


def _norms_as_initialised(model: torch.nn.Module) -> bool:
    """Whether there are norm layers, and all of them still have the values that new layers have: 1 or 0, and 0."""
    fresh, scaled = [], []
    for norm in model.modules():
        values = {key: getattr(norm, key, None) for key in ("weight", "bias", "running_mean")}
        tensors = {key: value.detach().cpu() for key, value in values.items() if isinstance(value, Tensor)}
        if "norm" not in type(norm).__name__.lower() or "weight" not in tensors:
            continue
        scale = tensors.pop("weight")
        ones = bool((scale == 1).all())
        scaled.append(ones)
        fresh.append((ones or not scale.any()) and not any(value.any() for value in tensors.values()))
    return any(scaled) and all(fresh)


def dead(name: str, taps: Sequence[str], output: TeacherOutput, images: Tensor) -> list[str]:
    """Taps whose maps say nothing of the images: equal for all of them, or equal at all positions.

    Args:
        name: of the teacher.
        taps: of the maps of `output`, in their order.
        output: what the teacher answered.
        images: the images `[B, 3, H, W]` it was asked about; if they are all alike, it may answer all alike.
    """
    maps = dict(zip(taps, output.maps, strict=False))
    if output.logits is not None and output.logits.ndim == 4:
        maps["logits"] = output.logits
    found: dict[str, list[str]] = {}
    for tap, value in maps.items():
        constant = [
            words
            for words, axes in (("for every image", (0,)), ("at every position", (2, 3)))
            if value.numel()
            and _varies(images, axes)
            and any(value.shape[axis] > 1 for axis in axes)
            and not _varies(value, axes)
        ]
        if constant and bool(torch.isfinite(value).all()):
            found.setdefault(" and ".join(constant), []).append(tap)
    return [
        f"{title(name)}: its output at {', '.join(where)} is the same {constant}; a student learns nothing from it"
        for constant, where in found.items()
    ]


def _varies(value: Tensor, axes: tuple[int, ...]) -> bool:
    """Whether any channel of `[B, C, H, W]` changes along these axes by more than `CONSTANT` of its largest value."""
    value = value.detach().float()
    spread = (value.amax(axes, keepdim=True) - value.amin(axes, keepdim=True)).amax((0, 2, 3))
    return bool((spread > CONSTANT * value.abs().amax((0, 2, 3))).any())


def weak(name: str, score: float, metric: str, student: str, reached: float, greater_is_better: bool) -> str:
    """What to say of a teacher that scores below a student; empty for a better one.

    Args:
        name: of the teacher in the result table.
        score: of the teacher.
        metric: that is compared.
        student: which one it is compared with.
        reached: the student's score.
        greater_is_better: the direction of the metric.
    """
    if not (score < reached if greater_is_better else score > reached):
        return ""
    return f"{name}: its {metric} of {score:.4f} is worse than the {reached:.4f} of the {student}"


class TeacherHealth:
    """Looks at each teacher once, and logs what is wrong with it.

    Args:
        teachers: by name.
        tells: whether this process logs.

    Attributes:
        findings: what is wrong, one sentence each.
    """

    def __init__(self, teachers: Mapping[str, Teacher], tells: bool = True) -> None:
        self.findings: list[str] = []
        self._tells = tells
        self._unseen = dict.fromkeys(teachers)
        self._first: dict[str, tuple[Tensor, TeacherOutput]] = {}  # of batches of one image
        for name, teacher in teachers.items():
            self.find(untrained(name, teacher))

    def find(self, findings: Sequence[str]) -> None:
        """Adds and logs findings."""
        for finding in findings:
            self.findings.append(finding)
            if self._tells:
                logger.warning("%s", finding)

    def see(self, name: str, taps: Sequence[str], output: TeacherOutput, images: Tensor) -> None:
        """Judges a teacher by what it says of the first images, at least two; waits for the device then."""
        if name not in self._unseen:
            return
        before = self._first.pop(name, None)
        if before is None and len(images) == 1:
            self._first[name] = images, output
            return
        if before is not None and before[0].shape[1:] == images.shape[1:]:
            images = torch.cat([before[0], images])
            output = TeacherOutput([torch.cat(pair) for pair in zip(before[1].maps, output.maps, strict=True)])
        del self._unseen[name]
        self.find(dead(name, taps, output, images))
