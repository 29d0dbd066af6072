"""Labels images: read in threads, predicted in batches of one size, written and recorded one batch after the other."""

import argparse
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from cankd_hf.data.common.decode import Unusable, is_left_out
from cankd_hf.data.common.hashes import picture_hash
from cankd_hf.data.common.progress import Told
from cankd_hf.label.folder import Output
from cankd_hf.label.images import Images, Picture
from cankd_hf.label.records import Record, Records, content_hash
from cankd_hf.label.teacher import LabelTeacher
from cankd_hf.tasks.labelling import Labelling
from cankd_hf.training.monitoring.cost import CostMeter

logger = logging.getLogger(__name__)
LOOKED_AT = 64  # images from which thresholds follow
WAITING = 4  # batches of images of other sizes that may wait until theirs is full


@dataclass
class Job:
    """All that one call works with."""

    options: argparse.Namespace
    teacher: LabelTeacher
    labelling: Labelling
    images: Images
    held: dict[str, str]
    output: Output
    records: Records
    device: torch.device
    meter: CostMeter
    key: str = ""  # of what predictions depend on


@dataclass
class Read:
    """A decoded image."""

    picture: Picture
    image: Tensor  # [3, H, W] uint8
    pixels: Tensor | None  # as the teacher takes it; None for one that is left out
    hash: str

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.image.shape[-2], self.image.shape[-1]

    def record(self, key: str) -> Record:
        """What is known of it before it is labelled."""
        one = self.picture
        known = {"source": one.source, "file_name": one.file_name, "stat": one.stat, "picture": self.hash}
        return {**known, "size": list(self.size), "settings": key}


def look(job: Job) -> None:
    """Shows the teacher some images, spread over the set, from which the task's thresholds follow."""
    job.teacher.model.to(job.device)
    pictures = job.images.pictures
    places = np.linspace(0, len(pictures) - 1, min(LOOKED_AT, len(pictures))).astype(int)
    with Told("finding thresholds", len(places)) as bar:
        for done, read in enumerate(_read_ahead(job, [pictures[place] for place in places])):
            bar.to(done)
            if read is not None and read.pixels is not None:
                job.labelling.look(job.teacher([read.pixels], job.device), [read.size])


def label_all(job: Job, todo: Sequence[Picture]) -> None:
    """Labels images and records each; what is recorded is finished."""
    job.teacher.model.to(job.device)
    session, count = uuid4().hex, job.options.batch_size
    waiting: dict[torch.Size, list[Read]] = {}
    with Told("labelling images", len(todo)) as bar:
        for done, read in enumerate(_read_ahead(job, todo)):
            bar.to(done)
            if read is None:
                continue
            if read.pixels is None:
                job.records.append([read.record(job.key)])
                continue
            waiting.setdefault(read.pixels.shape, []).append(read)
            full = max(waiting, key=lambda shape: len(waiting[shape]))
            if len(waiting[full]) == count or sum(map(len, waiting.values())) >= WAITING * count:
                _label(job, waiting.pop(full), session)
        for batch in waiting.values():
            _label(job, batch, session)


def _label(job: Job, batch: Sequence[Read], session: str) -> None:
    outputs = job.teacher([read.pixels for read in batch if read.pixels is not None], job.device)
    found = job.labelling.predict(outputs, [read.size for read in batch], job.teacher.model_type)
    made: list[Record] = []
    for read, prediction in zip(batch, found, strict=True):
        job.output.put_image(read.picture, read.image)
        files = {}
        for folder, content in prediction.files.items():
            name = f"{job.output.split}/{folder}/{read.picture.stem}.png"
            job.output.put(name, content)
            files[name] = content_hash(content)
        confidence = round(prediction.confidence, 4)
        made.append({**read.record(job.key), "files": files, "facts": prediction.facts, "confidence": confidence})
    job.records.append([*made, {"session": session, "cost": job.meter.cost}])


def _read_ahead(job: Job, todo: Sequence[Picture]) -> Iterator[Read | None]:
    """The images in their order, decoded in threads; None for one that does not decode and is left out.

    Raises:
        Unusable: for such an image, unless `data.on_error` is `skip`.
    """
    workers, coming = job.options.workers, iter(todo)
    with ThreadPoolExecutor(workers) as pool:
        ahead: list[Future[Read | None]] = [pool.submit(_read, job, one) for one in islice(coming, 4 * workers)]
        try:
            while ahead:
                yield ahead.pop(0).result()
                ahead += [pool.submit(_read, job, one) for one in islice(coming, 1)]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _read(job: Job, picture: Picture) -> Read | None:
    try:
        image = job.images.source.load(picture.number).image
    except Unusable as problem:
        if not is_left_out(problem, job.images.config.on_error):
            raise
        logger.warning("skipped: %s", problem)
        return None
    found = picture_hash(image)
    return Read(picture, image, None if found in job.held else job.teacher.read(image), found)
