"""Stored teachers in a training: which store is a teacher's, what a new one will cost, and what a run found."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cankd_hf.data.common.batch import Batch, BatchCollator
from cankd_hf.errors import InputError
from cankd_hf.hub.download import download_folder
from cankd_hf.losses.dist import DistLoss
from cankd_hf.losses.dkd import DKDLoss
from cankd_hf.losses.kl import KLLoss
from cankd_hf.teachers.codecs import Codec, Rows, codec_from, fields_of, make_codec, wider_than
from cankd_hf.teachers.identity import identity, machine, name_of
from cankd_hf.teachers.source import LiveTeachers
from cankd_hf.teachers.store import Store, create_store
from cankd_hf.teachers.store_files import check_free, read_header, stores_in
from cankd_hf.teachers.stored import StoredTeacher, StoredTeachers, clocks
from cankd_hf.training.asked import AskedMixin
from cankd_hf.training.cache_plan import Plan, Stopwatch
from cankd_hf.training.placing import reads
from cankd_hf.training.whole_images import check_needs, sizing

logger = logging.getLogger(__name__)

BESIDE = 64  # bytes of a store for each answer, beside its row
FIRST = 8  # batches on which codecs are fitted and measured


class CachingMixin(AskedMixin):
    """Methods of `CanKDTrainer` for teachers with a `cache`."""

    paid_files: Mapping[str, int] = {}  # files that this run had written before it was interrupted
    _unopened: list[str]

    def use_stores(self) -> None:
        """Makes the source of the outputs: live, or stored where a teacher has a cache. Stored teachers are moved to
        the device when they are run for the first time."""
        for name in self.teachers.keys() - self.caches.keys():
            self.place_teacher(name)
        for name in self.caches:
            self.teachers[name].destination = self._device(name).type
        before = getattr(self, "source", None)
        if isinstance(before, StoredTeachers):
            before.flush()
        if type(before) in (LiveTeachers, StoredTeachers) and self.caches:
            self.source = StoredTeachers(LiveTeachers(self.teachers), self.place_teacher, self._pictures)
        for name in self.caches if self.stores_whole_images else ():
            check_needs(self._path(name), self._needs(name), self.distiller.teachers[name])
        self._unopened = list(self.caches)

    def place_teacher(self, name: str) -> None:
        """Moves a teacher to its device, by default the student's.

        Raises:
            InputError: for a device of its own in a run of several processes, or where the student's features go
                through its head.
        """
        teacher, config = self.teachers[name], self.teachers[name].config
        place = "teacher" if len(self.teachers) == 1 else f"teachers.{name}"
        if config.device is not None or config.offload:
            key, value = ("device", config.device) if config.device is not None else ("offload", "true")
            if ":" in str(config.device) and self.args.world_size > 1:
                raise InputError(f"{place}.device: expected cpu in a run of several processes, got {config.device}")
            if any(item.term.loss == "cross_head" and item.teacher == name for item in self.distiller.placed):
                raise InputError(f"{place}.{key}: expected none with `cross_head`, which runs its head, got {value}")
        device = "cpu" if config.offload else config.device or self.args.device
        try:
            teacher = teacher.to(device)
        except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
            if config.device is None:
                raise
            said = " ".join(str(error).split())[:150]
            raise InputError(
                f"{place}.device: expected a device of this machine, got {config.device} ({said})"
            ) from error
        if self.args.channels_last:
            teacher.to(memory_format=torch.channels_last)

    @property
    def taught_collator(self) -> Any:
        """The collator of batches about which teachers are asked."""
        collator = self.data_collator
        if not (self.caches and isinstance(collator, BatchCollator)):
            return collator
        return collator.identifying(self.stores_whole_images)

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        collator = self.data_collator
        if kwargs.get("is_training", False):
            self.data_collator = self.taught_collator
        try:
            return super()._get_dataloader(dataset, *args, **kwargs)
        finally:
            self.data_collator = collator

    def _ask_teachers(self, batch: Batch, factors: list[float], measure: bool) -> dict[str, Any]:
        if self._unopened:
            self.open_stores()
        return super()._ask_teachers(batch, factors, measure)

    def plan_stores(self, answers: int) -> dict[str, Plan]:
        """What the stores will take when they have this many answers, by teacher; nothing is written."""
        plans = {}
        for name in self._unopened:
            store = self._found(name)
            header = self._new(name)[0] if store is None else store.header
            plans[name] = self._planned(header, answers, 0 if store is None else len(store))
        return plans

    def _planned(self, header: Mapping[str, Any], answers: int, there: int) -> Plan:
        return Plan(answers, int(header["row_bytes"]) + BESIDE, float(header["seconds"]), there)

    def open_stores(self, answers: int | None = None, make: bool = True) -> list[str]:
        """Opens the store of each teacher with a cache, or makes it: fits its codecs on the first training batches,
        measures their error, and says what it will take.

        Args:
            answers: how many there will be; by default as many as the run asks for.
            make: make those that are missing.

        Returns:
            The teachers that have none, without `make`.

        Raises:
            InputError: where the disk has too little room, or the folder cannot be written.
        """
        source, names, self._unopened = self.source, self._unopened, []
        if not isinstance(source, StoredTeachers):
            return []
        missing = []
        if answers is None:
            answers = self._answers()
        for name in names:
            with self.accelerator.main_process_first():
                store = self._found(name)
            if store is None and not make:
                missing.append(name)
                continue
            if store is None:
                header, fitted = self._new(name)
                plan = self._planned(header, answers, 0)
                check_free(self._disk(name), plan.missing * plan.size)
                store = create_store(self._folder(name), header, fitted)
            plan = self._planned(store.header, answers, len(store))
            if self.args.process_index == 0:
                logger.warning("teacher cache of %s: %s; %s", name, plan.line(), store.folder)
            check_free(store.folder, plan.missing * plan.size)
            source.stored[name] = self._ready(name, store)
        return missing

    def _temperature(self, name: str) -> float | None:
        """The largest temperature at which logits are read, if none is read but through a softmax over the classes."""
        losses = [i.loss for i in self.distiller.placed if i.teacher == name and reads(i.term) == "logits"]
        # Not of a class made of these, which may read what int8 does not keep, nor of a sigmoid for each class.
        shifting = all(
            type(one) in (DKDLoss, DistLoss) or (type(one) is KLLoss and one.activation == "softmax") for one in losses
        )
        return max(float(one.temperature) for one in losses) if losses and shifting else None  # type: ignore[arg-type]

    def _identity(self, name: str) -> dict[str, Any]:
        teacher, cache = self.teachers[name], self.caches[name]
        found = identity(teacher, self._device(name), cache.codec)
        if cache.whole:
            dataset: Any = self.train_dataset
            found["whole"] = [self.multiple(name), sizing(dataset.dataset)]
        return found

    def _device(self, name: str) -> torch.device:
        """Where a stored teacher computes what is missing."""
        return torch.device(self.teachers[name].config.device or self.args.device)

    def _folder(self, name: str) -> Path:
        """The folder of a new store of a teacher."""
        known = {"needs": sorted(self._needs(name)), "temperature": self._temperature(name)}
        return Path(self.caches[name].folder) / name_of({**self._identity(name), **known})

    def _found(self, name: str) -> Store | None:
        """The store with what the terms read of this teacher, if there is one."""
        cache, own, needs, new = self.caches[name], self._identity(name), self._needs(name), self._folder(name)
        folder = Path(cache.folder)
        if cache.repo is not None:
            download_folder(cache.repo, folder, f"{new.name}/*", f"{self._path(name)}.repo")
        for place in [new, *stores_in(folder)]:
            if (header := read_header(place)) is not None and self._serves(name, header, own, needs):
                return Store(place, header, self.paid_files)
        return None

    def _serves(self, name: str, header: Mapping[str, Any], own: Mapping[str, Any], needs: set[str]) -> bool:
        """Whether a store is of this teacher, and has what the terms read of it."""
        kept = {key for field in header["codecs"] for key in (field, field.partition(".")[0])}
        logits = header["codecs"].get("logits", {})
        fits = "logits" not in needs or logits.get("temperature", self._temperature(name)) == self._temperature(name)
        return header["identity"] == own and needs <= kept and ("dense" in needs) == ("dense" in kept) and fits

    def _ready(self, name: str, store: Store) -> StoredTeacher:
        header, teacher, needs, source = store.header, self.teachers[name], self._needs(name), self.source
        assert isinstance(source, StoredTeachers)
        fitted: dict[str, dict[str, Tensor]] = {}
        for key, value in store.fitted.items():
            field, _, inner = key.partition(":")
            fitted.setdefault(field, {})[inner] = value
        codecs = {field: codec_from(settings, fitted.get(field, {})) for field, settings in header["codecs"].items()}
        other = needs - {need for need in needs if need.startswith("maps.")}
        wanted = [field for field in codecs if field in needs or (other and not field.startswith("maps."))]
        teacher.reads_logits |= "logits" in codecs
        teacher.reads_queries |= "queries.boxes" in codecs  # a store keeps them whether this run reads them or not
        return StoredTeacher(
            store,
            lambda images: source.run(name, images),
            Rows(codecs),
            wanted,
            len(self.distiller.teachers[name].levels),
            together=teacher.config.compile,
            foreign=header["machine"] != machine(self._device(name)),
        )

    def _new(self, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Header and fitted values of a new store: its codecs are fitted and measured on the first batches, but for
        the last one, which measures."""
        source, needs, before = self.source, self._needs(name), clocks(self.args.device)
        assert isinstance(source, StoredTeachers)
        codecs: dict[str, Codec] = {}
        exact: dict[str, Tensor] = {}
        watch = Stopwatch()
        for batch in self.first_batches(FIRST):
            for key, codec in codecs.items():  # of the batch before: the last one measures
                codec.add(exact[key])
            pictures = self._pictures(name, batch)
            _, images = next(pictures.images(list(range(len(pictures.keys)))))
            found = fields_of(source.run(name, images))
            exact = {key: value for key, value in found.items() if key in needs or not key.startswith("maps.")}
            codecs = codecs or self._codecs(name, exact)
            watch.lap(self.args.device, len(images))
        if not codecs:
            raise InputError("train_dataset: expected one to store the teacher's answers for, got none")
        rows, errors = self._measured(codecs, exact)
        start = time.perf_counter()
        layout, packed = rows.pack(exact)
        rows.within(rows.errors(exact, rows.unpack(layout, packed)))
        seconds = watch.each + (time.perf_counter() - start) / len(packed)
        header = {
            "identity": self._identity(name),
            "codecs": {key: {**codec.settings(), **errors[key]} for key, codec in rows.codecs.items()},
            "row_bytes": packed.shape[1],
            "seconds": seconds,
            "machine": machine(self._device(name)),
            "teacher": self.teachers[name].manifest(),
            "views": self.caches[name].views,
            "cost": {clock: now - before[clock] for clock, now in clocks(self.args.device).items()},
        }
        fitted = {
            f"{key}:{inner}": one for key, codec in rows.codecs.items() for inner, one in codec.tensors().items()
        }
        return header, fitted

    def _disk(self, name: str) -> Path:
        folder = Path(self.caches[name].folder).absolute()
        return next(place for place in (folder, *folder.parents) if place.exists())

    def _codecs(self, name: str, exact: Mapping[str, Tensor]) -> dict[str, Codec]:
        codec, temperature = self.caches[name].codec, self._temperature(name)
        return {key: make_codec(codec, key, value, temperature) for key, value in exact.items()}

    def _measured(
        self, codecs: dict[str, Codec], exact: Mapping[str, Tensor]
    ) -> tuple[Rows, dict[str, dict[str, float]]]:
        """The codecs, fitted, and their errors; logits that int8 does not hold closely enough become float16."""
        for key, codec in codecs.items():
            codec.settle(exact[key])
        while True:
            rows = Rows(codecs)
            errors = rows.errors(exact, rows.unpack(*rows.pack(exact)))
            wider = {key: wider_than(codec, float(errors[key].max())) for key, codec in codecs.items()}
            if wider == codecs:
                break
            codecs = wider
        told = {key: {"error": float(one.mean()), "worst": float(one.max())} for key, one in errors.items()}
        if self.args.process_index == 0:
            for key, one in told.items():
                codec = codecs[key]
                said = key, codec.kind, codec.error_of, one["error"], one["worst"]
                logger.warning("teacher cache: %s as %s: %s %.2g, at worst %.2g", *said)
        return rows, told

    # What a run found

    def cache_facts(self) -> dict[str, Any]:
        """How many pictures had a stored answer, by teacher, as plain data."""
        return {
            name: {**one.found.facts(), "folder": str(one.store.folder), "codec": self.caches[name].codec}
            for name, one in self.stored.items()
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            for name, one in self.stored.items():
                since = torch.tensor(one.found.since(), dtype=torch.float32).to(self.args.device)
                hits, misses = self.accelerator.reduce(since, "sum").tolist()
                key = "teacher_cache_hits" if len(self.stored) == 1 else f"teacher_cache_hits/{name}"
                logs |= {key: hits / (hits + misses)} if hits + misses else {}
        super().log(logs, start_time)
