"""Is it working? One verdict on a distillation, from what its log has of held-out images; pure functions."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LEARNING, PLATEAU, SHORTCUT, BROKEN = "learning", "plateau", "shortcut", "broken teacher"
PREFIX = "held_"  # of the entries of the log history that are read here
LOSS, PLAIN, CKA, CORRELATION, PROBE = (f"{PREFIX}{name}" for name in ("loss", "plain", "cka", "correlation", "probe"))

LEAST = 3  # measurements below which nothing is said: a start, an end, and one to tell a trend from a step
# Relative fall from which a loss counts as learnt. Trained alone on a frozen student, connectors and blocks take half
# of it; the first steps of any run, in which only they adapt, take about a tenth.
FELL = 0.15
# Share of its distance to 1 that a raw similarity must close to count as risen. For a student that cannot move it is
# 0: the images are the same each time, and the running statistics of BatchNorms are left out.
MOVED = 0.03
# The same over the second half of the steps so far, below which all has come to rest; of losses and scores it is the
# relative change. Four times less than what counts as learnt, as half of the time has a falling learning rate.
STILL = 0.0075
# Relative fall of the loss with its block switched off, below which only the block took part in a fall of `FELL`.
ONLY_BLOCK = 0.05


@dataclass(frozen=True)
class Verdict:
    """What is said of a run.

    Attributes:
        kind: learning, plateau, shortcut or broken teacher; None where nothing can be said.
        line: the same in a sentence, with the numbers behind it.
        numbers: first and last value of everything that was measured, by its name in the log.
    """

    kind: str | None
    line: str
    numbers: dict[str, list[float]] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """As plain data, for files; empty where there is nothing to say."""
        return {"verdict": self.kind, "line": self.line, "numbers": self.numbers} if self.line else {}


def judge(
    history: Sequence[Mapping[str, Any]],
    findings: Sequence[str] = (),
    metric: str = "",
    greater_is_better: bool = True,
    reason: str = "",
) -> Verdict:
    """The verdict on a run so far.

    Args:
        history: its `log_history`.
        findings: what is wrong with its teachers, from `TeacherHealth`.
        metric: the task's score, logged as `eval_METRIC`.
        greater_is_better: the direction of the score.
        reason: why nothing was measured, if so.
    """
    score = f"eval_{metric}"
    series = {name: _series(history, name) for name in (LOSS, PLAIN, CKA, CORRELATION, PROBE, score)}
    series = {name: found for name, found in series.items() if found}
    ends = {name: [found[0][1], found[-1][1]] for name, found in series.items()}
    said = "".join(f"; {_told(name, *pair)}" for name, pair in ends.items())
    if findings:  # they are told wherever this is
        return Verdict(BROKEN, f"{BROKEN}: what is learnt from it is of no use, see the warning about it{said}", ends)
    if len(series.get(LOSS, ())) < LEAST:
        return Verdict(None, f"not judged: {reason or 'too little was measured so far'}", ends)
    sign = 1 if greater_is_better else -1
    kind, why = _kind(series, {score: sign})
    return Verdict(kind, f"{kind}: {why}{said}", ends)


def _kind(series: Mapping[str, list[tuple[float, float]]], signs: Mapping[str, int]) -> tuple[str, str]:
    """Which verdict, and why in words."""
    gains = {name: gain(name, found[0][1], found[-1][1], signs) for name, found in series.items()}
    similar = [gains[name] for name in (CKA, CORRELATION) if name in gains]
    if gains[LOSS] >= FELL and similar and max(similar) < MOVED:
        return SHORTCUT, "the loss falls in the connectors' and losses' own parameters, the student's maps stay unlike"
    if gains[LOSS] >= FELL and gains.get(PLAIN, 1.0) < ONLY_BLOCK:
        return SHORTCUT, "the loss falls in the block, and with the block switched off it does not"
    if all(_rests(name, found, signs) for name, found in series.items()):
        if max(similar, default=gains[LOSS]) >= MOVED:
            return PLATEAU, "it learnt, and nothing has become better since half of the steps"
        return PLATEAU, "nothing has become better since half of the steps, and hardly anything before"
    if max(similar, default=gains[LOSS]) < MOVED:
        return PLATEAU, "the student has hardly become more like the teacher so far"
    scored = [gains[name] for name in (*signs, PROBE) if len(series.get(name, ())) > 1]
    if scored and max(scored) <= 0:
        return LEARNING, "the student becomes more like the teacher, but its score is not above that of its start"
    return LEARNING, "the student becomes more like the teacher"


def gain(name: str, first: float, last: float, signs: Mapping[str, int]) -> float:
    """How much better a value has become: the closed share of the distance to 1 of a similarity, the relative fall of
    a loss, the relative rise of a score (fall, where its sign is -1)."""
    if name in (CKA, CORRELATION):
        return (last - first) / max(1 - first, 1e-6)
    return signs.get(name, 1 if name == PROBE else -1) * (last - first) / max(abs(first), 1e-6)


def _rests(name: str, found: list[tuple[float, float]], signs: Mapping[str, int]) -> bool:
    """Whether a value has not become better since half of the steps."""
    if len(found) < LEAST:
        return True
    half = found[-1][0] / 2
    before = max((point for point in found[:-1] if point[0] <= half), default=found[0])
    return gain(name, before[1], found[-1][1], signs) < STILL


def _series(history: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, value) of everything logged under a name that is a finite number."""
    values = ((entry.get("step", 0), entry.get(name)) for entry in history)
    return [(step, value) for step, value in values if isinstance(value, int | float) and math.isfinite(value)]


_WORDS: dict[str, Callable[[float, float], str]] = {
    LOSS: lambda a, b: f"held-out distillation loss {a:.3g} to {b:.3g}",
    PLAIN: lambda a, b: f"without its block {a:.3g} to {b:.3g}",
    CKA: lambda a, b: f"raw CKA {a:.3f} to {b:.3f}",
    CORRELATION: lambda a, b: f"raw correlation {a:.3f} to {b:.3f}",
    PROBE: lambda a, b: f"kNN probe {a:.1%} to {b:.1%}",
}


def _told(name: str, first: float, last: float) -> str:
    words = _WORDS.get(name)
    return words(first, last) if words is not None else f"{name.removeprefix('eval_')} {first:.4f} to {last:.4f}"
