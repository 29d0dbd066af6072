"""Run by torchrun from test_task: half the batch in each of two processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.instances.test_task import distilled
from tests.processes import leave_together

folder = Path(sys.argv[1])
made, scores, weight = distilled(folder / "two", batch=2)
rank = made.args.process_index
if rank == 0:
    (folder / "found.json").write_text(json.dumps([scores, weight]))
leave_together(folder, rank)
