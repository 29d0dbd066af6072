"""Run by torchrun from test_broken_images: a recipe in two processes, of which one may meet a broken image."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from cankd_hf import train
from cankd_hf.training import first_batch

first_batch.LOOKED_AT = 1
folder, file, *overrides = sys.argv[1:]
code = train.main([file, *overrides])
(Path(folder) / f"code{os.environ['RANK']}").write_text(str(code))
os._exit(0)  # without waiting for the other, which waits for this one in a collective
