"""Decoded samples, kept for all loading processes."""

import io
import logging
import os
import pickle
import platform
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from cankd_hf.data.common.decode import Sample

logger = logging.getLogger(__name__)
ROOM = 2**30  # bytes of disk and of memory that are left free
FULL = "full"  # the file that says so to the other processes


class SampleCache:
    """Samples by number; each is decoded once, by whichever process needs it first.

    They lie in a temporary folder, one file a sample, so that every loading process finds them, forked or spawned, in
    this epoch or a later one; the system keeps files in memory while there is room. The folder is removed with the
    object that made it, or at the end of its process; those of processes that were killed, by the next cache. Where
    less than `ROOM` would be left of the disk or the memory, nothing more is kept, with one warning.
    """

    def __init__(self) -> None:
        prefix = f"cankd-cache-{platform.node()}-"
        for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
            process = left.name.removeprefix(prefix).split("-")[0]
            if process.isdigit() and not psutil.pid_exists(int(process)):
                shutil.rmtree(left, ignore_errors=True)
        self.folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-"))
        weakref.finalize(self, _remove, self.folder, os.getpid())

    def __deepcopy__(self, memo: dict[int, Any]) -> "SampleCache":
        return self  # a copy of a data set holds the same samples

    def sample(self, number: int, load: Callable[[int], Sample]) -> Sample:
        """The sample of this number; raises what `load` raises."""
        file = self.folder / str(number)
        try:
            return pickle.loads(file.read_bytes())
        except FileNotFoundError:
            sample = load(number)
        if not (self.folder / FULL).exists():
            self._keep(file, sample)
        return sample

    def _keep(self, file: Path, sample: Sample) -> None:
        """Writes a sample aside and renames it into place."""
        content = io.BytesIO()
        _Pickler(content, protocol=5).dump(sample)
        partial = file.with_name(f"{file.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            free = min(shutil.disk_usage(self.folder).free, psutil.virtual_memory().available)
            if free < ROOM + content.getbuffer().nbytes:
                self._stop(f"less than {ROOM / 2**30:g} GB of disk or memory is left")
                return
            partial.write_bytes(content.getbuffer())
            partial.replace(file)
        except OSError as error:
            partial.unlink(missing_ok=True)
            self._stop(str(error))

    def _stop(self, reason: str) -> None:
        """Keeps nothing more, in all processes; the first one says so."""
        kept = sum(1 for _ in self.folder.glob("[0-9]*"))
        try:
            self.folder.mkdir(exist_ok=True)  # it may have been removed under us
            (self.folder / FULL).touch(exist_ok=False)
        except FileExistsError:
            return
        except OSError as error:
            reason = f"{reason}; {error}"
        logger.warning(
            "data.cache: %d images are kept in %s, the others are decoded each time: %s; point TMPDIR to a larger "
            "disk, or set data.cache: false",
            *(kept, self.folder, reason),
        )


class _Pickler(pickle.Pickler):
    """Tensors as arrays, which pickle in a fraction of the time."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not torch.Tensor:
            return NotImplemented
        if value.ndim == 3 and not value.is_contiguous():  # an image keeps its memory, which is [H, W, 3]
            return _image, (value.permute(1, 2, 0).numpy(),)
        return torch.from_numpy, (value.numpy(),)


def _image(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _remove(folder: Path, owner: int) -> None:
    """Removes the folder, unless this is a fork of the process that made it."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
