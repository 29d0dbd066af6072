"""Stored teachers: a source of outputs that replays stored answers, and computes and stores the others."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cankd_hf.data.common.batch import PICTURES, Batch
from cankd_hf.teachers.codecs import Rows, fields_of, output_of
from cankd_hf.teachers.pictures import Pictures
from cankd_hf.teachers.source import LiveTeachers, asked
from cankd_hf.teachers.store import Cost, Damaged, Ref, Store
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
        together: all pictures of a batch are computed where any is missed, as a compiled teacher wants one size.
        foreign: the store was written by other libraries or on another kind of device: its first answer is compared.
    """

    def __init__(
        self,
        store: Store,
        live: Callable[[Tensor], TeacherOutput],
        rows: Rows,
        wanted: Collection[str],
        maps: int,
        together: bool = False,
        foreign: bool = False,
    ) -> None:
        self.store, self.live, self.rows = store, live, rows
        self.wanted, self.maps, self.together = list(wanted), maps, together
        self.found = Found()
        self.refused: set[bytes] = set()
        self.distrusted = self.old = False  # old: all views were seen before, so that a miss needs a reason
        self.spends: Callable[[], Cost] | None = None  # of a run that only fills stores: what it spent since the last
        self._doubted = foreign

    def __call__(self, pictures: Pictures) -> TeacherOutput:
        """The outputs for the pictures of a batch."""
        groups = self.stored(pictures.keys, pictures.device)
        if groups and self._doubted:
            self._doubted = False
            self._compare(pictures, Group(groups[0].places[:1], groups[0].layout, groups[0].rows[:1]))
            return self(pictures)
        parts = self._computed(pictures, {place for group in groups for place in group.places})
        cut = [(places, pictures.cut(places, fields, _types(fields))) for places, fields in parts]
        for places, layout, rows in groups:
            fields = self.rows.unpack(layout, rows, self.wanted, narrow=True)
            cut.append((places, pictures.cut(places, fields, self.rows.types(layout))))
        return output_of(_joined(cut, len(pictures.keys)), self.maps)

    def fill(self, pictures: Pictures) -> None:
        """Computes and stores the answers that are missing."""
        there = self.store.find(pictures.keys)
        self._computed(pictures, {place for place, ref in enumerate(there) if ref is not None})

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

    def _computed(self, pictures: Pictures, hits: Collection[int]) -> list[tuple[list[int], dict[str, Tensor]]]:
        """The places and fields of pictures that are computed, at least those without an answer; these are stored."""
        keys = pictures.keys
        missed = [place for place in range(len(keys)) if place not in hits]
        self.found.hits += len(hits)
        self.found.misses += len(missed)
        if not missed:
            return []
        seen = pictures.seen()
        if self.old:
            unknown = [seen[place] for place in missed if keys[place] not in self.refused]
            self.found.reasons.update(map(self.store.why_not, unknown))
        before, parts = clocks(pictures.device), []
        for places, images in pictures.images(list(range(len(keys))) if self.together else missed):
            exact = {name: value for name, value in fields_of(self.live(images)).items() if name in self.rows.codecs}
            layout, rows = self.rows.pack(exact)
            values = self.rows.unpack(layout, rows)
            errors = self.rows.errors(exact, values, lossy=True)
            good = self.rows.within(errors) if errors else torch.ones(len(places), dtype=torch.bool)
            fits = dict(zip(places, good.tolist(), strict=True))
            wanted = [place for place in places if place in missed]
            kept = [place for place in wanted if fits[place]]
            if kept and not self.distrusted:
                content = rows[[places.index(place) for place in kept]].cpu()
                cost = self._cost(before, images.device)
                self.store.add(layout, [keys[n] for n in kept], content, [seen[n] for n in kept], cost)
                before = clocks(images.device)
            if len(kept) < len(wanted):
                self.found.refused += len(wanted) - len(kept)
                self.refused.update(keys[place] for place in wanted if not fits[place])
                values = {name: torch.where(_like(good, value), value, exact[name]) for name, value in values.items()}
            parts.append((places, {name: values[name] for name in self.wanted}))
        return parts

    def _cost(self, before: Cost, device: torch.device) -> Cost:
        """Seconds of a computation; in a run that only fills stores, all since the last one."""
        if self.spends is not None:
            return self.spends()
        now = clocks(device)
        return {name: now[name] - start for name, start in before.items()}

    def differences(self, pictures: Pictures, group: Group) -> dict[str, Tensor]:
        """The error of stored answers against live ones, `[n]` by field; n pictures in groups of one size."""
        found: dict[str, list[Tensor]] = {}
        for places, images in pictures.images(group.places):
            live = {name: value for name, value in fields_of(self.live(images)).items() if name in self.rows.codecs}
            rows = group.rows[[group.places.index(place) for place in places]]
            for name, errors in self.rows.errors(live, self.rows.unpack(group.layout, rows)).items():
                found.setdefault(name, []).append(errors)
        return {name: torch.cat(errors) for name, errors in found.items()}

    def allowed(self, field_name: str, elsewhere: bool) -> float:
        """The largest error of a field; more, where the answer was computed elsewhere."""
        return self.rows.codecs[field_name].bound + (ELSEWHERE if elsewhere else 0.0)

    def _compare(self, pictures: Pictures, group: Group) -> None:
        """Looks whether an answer of another machine is one of this teacher, and distrusts all if not."""
        for name, error in self.differences(pictures, group).items():
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
        pictures: those of a batch that a teacher is asked about, by its name.
    """

    def __init__(
        self, live: LiveTeachers, place: Callable[[str], None], pictures: Callable[[str, Batch], Pictures]
    ) -> None:
        self.live, self.place, self.pictures = live, place, pictures
        self.stored: dict[str, StoredTeacher] = {}
        self._placed: set[str] = set()

    def __call__(self, batch: Batch, names: Collection[str] | None = None) -> dict[str, TeacherOutput]:
        """See `TeacherSource`."""
        found: dict[str, TeacherOutput] = {}
        for name in self.live.teachers if names is None else names:
            if PICTURES not in batch or name not in self.stored:
                found[name] = self.run(name, batch.teacher_images)
            else:
                found[name] = self.stored[name](self.pictures(name, batch))
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


def _types(fields: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    return {name: value.dtype for name, value in fields.items()}


def _like(good: Tensor, value: Tensor) -> Tensor:
    """bool `[B]` as `[B, 1, ...]`."""
    return good.view(-1, *([1] * (value.ndim - 1)))


def clocks(device: torch.device) -> Cost:
    """CPU seconds of this process, and seconds of the device, or by the clock without one."""
    if device.type == "cpu":
        return {CPU: time.process_time(), WALL: time.perf_counter()}
    torch.accelerator.synchronize(device)
    return {CPU: time.process_time(), DEVICE: time.perf_counter()}
