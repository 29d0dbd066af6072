"""A warning where threads wait for cores that other programs use."""

import logging
import os
import sys
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cankd_hf.host import Host, Load, usable_cores

logger = logging.getLogger(__name__)

_SECONDS = 2.0  # of training before the first look: a shorter one may see the end of something else


class BusyCoresCallback(TrainerCallback):
    """Warns once, at a log line, where a run on the CPU has more threads than cores that other programs leave free.

    It changes nothing: in a notebook the number of threads is the user's. Of several processes on a machine each has
    its own threads, which this one cannot tell from other programs; there it says nothing.
    """

    def __init__(self) -> None:
        self._load: Load | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        alone = os.environ.get("LOCAL_WORLD_SIZE", "1") == "1"
        watched = alone and args.device.type == "cpu" and torch.get_num_threads() > 1
        self._load = Load() if watched else None

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._load is None or self._load.age() < _SECONDS:
            return
        host = Host(usable_cores(), self._load.others(usable_cores()))
        threads, fits = torch.get_num_threads(), host.threads()
        if threads > fits:
            self._load = None  # told
            with tqdm.external_write_mode(sys.stderr):  # on a line of its own, not behind the bar
                logger.warning(
                    "threads: %d on %d usable cores, %.1f of them in use by other programs: each operation waits for "
                    "its last thread; OMP_NUM_THREADS=%d or torch.set_num_threads(%d) may be faster",
                    *(threads, host.cores, host.others, fits, fits),
                )
