"""Stored teachers: a source of outputs that replays stored answers, and computes and stores the others."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cankd_hf.data.common.batch import PICTURES, Batch
from cankd_hf.teachers.codecs import Rows, fields_of, output_of
from cankd_hf.teachers.source import LiveTeachers, asked
from cankd_hf.teachers.store import Cost, Damaged, Ref, Seen, Store
from cankd_hf.teachers.teacher import TeacherOutput

logger = logging.getLogger(__name__)

CPU, DEVICE, WALL = "cpu_seconds", "device_seconds", "wall_seconds"  # as a `CostMeter` calls them
# What another kind of device, or other versions of the libraries, may change of an answer beside the codec.
ELSEWHERE = 0.02


@dataclass
class Found:
    """How many pictures had a stored answer.

    Attributes:
        hits: those that had.
        misses: those that had not, and were computed.
        refused: of these, those that are further off than the codec's bound, which are never stored.
        reasons: why the others had none, after their views were seen once.
    """

    hits: int = 0
    misses: int = 0
    refused: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    _logged: tuple[int, int] = (0, 0)

    def since(self) -> list[int]:
        """Hits and misses since this was last called."""
        before, self._logged = self._logged, (self.hits, self.misses)
        return [now - then for now, then in zip(self._logged, before, strict=True)]

    def facts(self) -> dict[str, Any]:
        """As plain data."""
        return {"hits": self.hits, "misses": self.misses, "refused": self.refused, "reasons": dict(self.reasons)}


class Group(NamedTuple):
    """Stored rows of one layout.

    Attributes:
        places: of their pictures in the batch.
        layout: of the rows.
        rows: on the device, uint8 `[n, R]`.
    """

    places: list[int]
    layout: str
    rows: Tensor


class StoredTeacher:
    """The answers of one teacher.

    What is computed goes through the codec too: a run that fills the store and one that reads it get the same values.
    Pictures that are beyond the codec's bound are answered live each time.

    Args:
        store: with the answers.
        live: runs the teacher on images `[B, 3, H, W]`.
        rows: the store's codecs.
        wanted: the fields that are read, of those in the store.
        maps: the number of the teacher's maps.
        whole: batches are computed whole where any picture is missed, as a compiled teacher wants one size.
        foreign: the store was written by other libraries or on another kind of device: its first answer is compared.
    """

    def __init__(
        self,
        store: Store,
        live: Callable[[Tensor], TeacherOutput],
        rows: Rows,
        wanted: Collection[str],
        maps: int,
        whole: bool = False,
        foreign: bool = False,
    ) -> None:
        self.store, self.live, self.rows = store, live, rows
        self.wanted, self.maps, self.whole = list(wanted), maps, whole
        self.found = Found()
        self.refused: set[bytes] = set()
        self.distrusted = self.old = False  # old: all views were seen before, so that a miss needs a reason
        self.spends: Callable[[], Cost] | None = None  # of a run that only fills stores: what it spent since the last
        self._doubted = foreign

    def __call__(self, images: Tensor, keys: Sequence[bytes], of: Callable[[], list[Seen]]) -> TeacherOutput:
        """The outputs for pictures.

        Args:
            images: what the teacher sees, `[B, 3, H, W]`.
            keys: the identity of each.
            of: what each is of; only asked where one is missed, as it waits for the device.
        """
        groups = self.stored(keys, images.device)
        if groups and self._doubted:
            self._doubted = False
            self._compare(images[groups[0].places[:1]], groups[0].layout, groups[0].rows[:1])
            return self(images, keys, of)
        hits = {place for group in groups for place in group.places}
        missed = [place for place in range(len(keys)) if place not in hits]
        self.found.hits += len(hits)
        self.found.misses += len(missed)
        parts = [] if not missed else [self._computed(images, missed, keys, of())]
        parts += [(group.places, self.rows.unpack(group.layout, group.rows, self.wanted)) for group in groups]
        return output_of(_joined(parts, len(keys)), self.maps)

    def stored(self, keys: Sequence[bytes], device: torch.device) -> list[Group]:
        """The rows of the pictures that have an answer, on the device, by their layout."""
        layouts: dict[str, list[tuple[int, Ref]]] = {}
        for place, ref in enumerate([] if self.distrusted else self.store.find(keys)):
            if ref is not None:
                layouts.setdefault(self.store.layout(ref), []).append((place, ref))
        try:
            read = {
                layout: self.store.read([ref for _, ref in hits], pin=device.type == "cuda")
                for layout, hits in layouts.items()
            }
        except Damaged as error:
            logger.warning("%s; it is computed again", error)
            return self.stored(keys, device)
        return [
            Group([place for place, _ in hits], layout, read[layout].to(device, non_blocking=True))
            for layout, hits in layouts.items()
        ]

    def _computed(
        self, images: Tensor, missed: list[int], keys: Sequence[bytes], seen: Sequence[Seen]
    ) -> tuple[list[int], dict[str, Tensor]]:
        """The places and fields of pictures that are computed, at least those that were missed; these are stored."""
        if self.old:
            unknown = [seen[place] for place in missed if keys[place] not in self.refused]
            self.found.reasons.update(map(self.store.why_not, unknown))
        asked, before = list(range(len(keys))) if self.whole else missed, clocks(images.device)
        output = self.live(images if len(asked) == len(images) else images[asked])
        exact = {name: value for name, value in fields_of(output).items() if name in self.rows.codecs}
        layout, rows = self.rows.pack(exact)
        values = self.rows.unpack(layout, rows)
        errors = self.rows.errors(exact, values, lossy=True)
        good = self.rows.within(errors) if errors else torch.ones(len(asked), dtype=torch.bool)
        fits = dict(zip(asked, good.tolist(), strict=True))
        kept = [place for place in missed if fits[place]]
        if kept and not self.distrusted:
            content = rows[[asked.index(place) for place in kept]].cpu()
            cost = self._cost(before, images.device)
            self.store.add(layout, [keys[n] for n in kept], content, [seen[n] for n in kept], cost)
        if len(kept) < len(missed):
            self.found.refused += len(missed) - len(kept)
            self.refused.update(keys[place] for place in missed if not fits[place])
            values = {name: torch.where(_like(good, value), value, exact[name]) for name, value in values.items()}
        return asked, {name: values[name] for name in self.wanted}

    def _cost(self, before: Cost, device: torch.device) -> Cost:
        """Seconds of a computation; in a run that only fills stores, all since the last one."""
        if self.spends is not None:
            return self.spends()
        now = clocks(device)
        return {name: now[name] - start for name, start in before.items()}

    def differences(self, images: Tensor, layout: str, rows: Tensor) -> dict[str, Tensor]:
        """The error of stored answers against live ones, `[B]` by field."""
        exact = {name: value for name, value in fields_of(self.live(images)).items() if name in self.rows.codecs}
        return self.rows.errors(exact, self.rows.unpack(layout, rows))

    def allowed(self, field_name: str, elsewhere: bool) -> float:
        """The largest error of a field; more, where the answer was computed elsewhere."""
        return self.rows.codecs[field_name].bound + (ELSEWHERE if elsewhere else 0.0)

    def _compare(self, images: Tensor, layout: str, rows: Tensor) -> None:
        """Looks whether an answer of another machine is one of this teacher, and distrusts all if not."""
        for name, error in self.differences(images, layout, rows).items():
            if not bool((error <= self.allowed(name, True)).all()):
                self.distrusted = True
                said = self.store.folder, self.store.header["machine"], name, float(error.max())
                logger.warning(
                    "teacher cache: %s was written by %s, and its %s is %.2g off this teacher's; it is not used", *said
                )


class StoredTeachers:
    """A `TeacherSource` with stored answers for some teachers; the others, and pictures of no identity, are live.

    Args:
        live: all teachers.
        place: brings a teacher to the device, before it is run for the first time.
    """

    def __init__(self, live: LiveTeachers, place: Callable[[str], None]) -> None:
        self.live, self.place = live, place
        self.stored: dict[str, StoredTeacher] = {}
        self._placed: set[str] = set()

    def __call__(self, batch: Batch, names: Collection[str] | None = None) -> dict[str, TeacherOutput]:
        """See `TeacherSource`."""
        keys, images = batch.get(PICTURES), batch.teacher_images
        found: dict[str, TeacherOutput] = {}
        for name in self.live.teachers if names is None else names:
            if keys is None or name not in self.stored:
                found[name] = self.run(name, images)
            else:
                found[name] = self.stored[name](images, keys, lambda: seen_of(batch))
        return found

    def run(self, name: str, images: Tensor) -> TeacherOutput:
        """The live output of a teacher for what it sees, `[B, 3, H, W]`."""
        if name not in self._placed:
            self.place(name)
            self._placed.add(name)
        return asked(self.live.teachers[name], images)

    def flush(self) -> None:
        """Writes what was computed."""
        for one in self.stored.values():
            one.store.flush()


def seen_of(batch: Batch) -> list[Seen]:
    """What the pictures of a batch are of."""
    images, meta = batch.teacher_images, batch.meta
    numbers = (meta[name].tolist() if name in meta else [-1] * len(images) for name in ("sample", "view"))
    return [Seen(sample, view, images.shape[-2], images.shape[-1]) for sample, view in zip(*numbers, strict=True)]


def _joined(parts: Sequence[tuple[Sequence[int], dict[str, Tensor]]], count: int) -> dict[str, Tensor]:
    """The fields of a batch of its parts, with the places of their pictures; later ones win."""
    places, fields = parts[0]
    if len(parts) == 1 and list(places) == list(range(count)):
        return fields
    made = {name: value.new_empty(count, *value.shape[1:]) for name, value in fields.items()}
    for places, fields in parts:
        for name, value in fields.items():
            made[name][list(places)] = value
    return made


def _like(good: Tensor, value: Tensor) -> Tensor:
    """bool `[B]` as `[B, 1, ...]`."""
    return good.view(-1, *([1] * (value.ndim - 1)))


def clocks(device: torch.device) -> Cost:
    """CPU seconds of this process, and seconds of the device, or by the clock without one."""
    if device.type == "cpu":
        return {CPU: time.process_time(), WALL: time.perf_counter()}
    torch.accelerator.synchronize(device)
    return {CPU: time.process_time(), DEVICE: time.perf_counter()}
