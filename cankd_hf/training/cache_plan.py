"""What a store of a teacher's answers will take: measured on a few batches, and told before it is written."""

import time
from dataclasses import dataclass

import torch

from cankd_hf.durations import duration


@dataclass(frozen=True)
class Plan:
    """What a store will take when all its answers are there.

    Attributes:
        answers: their number.
        size: bytes of one.
        seconds: by the clock for one: reading the picture, the teacher, and the codec.
        there: answers that are stored already.
    """

    answers: int
    size: int
    seconds: float
    there: int = 0

    @property
    def missing(self) -> int:
        """Answers that are still to be computed, at most."""
        return max(0, self.answers - self.there)

    def line(self) -> str:
        """In words."""
        size, left = self.size * self.answers, self.missing * self.seconds
        return (
            f"{self.answers} answers of {self.size / 1e6:.3f} MB, {size / 1e9:.3f} GB in all; {self.there} are there, "
            f"the others take about {duration(left)}"
        )


class Stopwatch:
    """The seconds for a picture of batches that are read and answered one after the other, without the first one."""

    def __init__(self) -> None:
        self._start, self._laps = time.perf_counter(), list[tuple[float, int]]()

    def go_on(self) -> None:
        """Leaves out the time since the last lap, in which codecs are fitted."""
        self._start = time.perf_counter()

    def lap(self, device: torch.device, images: int) -> None:
        """Ends the lap of a batch."""
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        now = time.perf_counter()
        self._laps.append((now - self._start, images))
        self._start = now

    @property
    def each(self) -> float:
        """Seconds for a picture."""
        laps = self._laps[1:] or self._laps
        return sum(seconds for seconds, _ in laps) / sum(images for _, images in laps)
