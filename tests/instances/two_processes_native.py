"""Run by torchrun from test_native: half the batch in each of two processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.instances.native_trainers import one_step
from tests.processes import leave_together

folder, rank, found = Path(sys.argv[1]), 0, {}
for name in sys.argv[2:]:
    made = one_step(folder / name, name, batch=2)
    rank = made.args.process_index
    weights = [float(parameter.double().sum()) for parameter in made.student.parameters()]
    found[name] = [made.state.log_history[0]["loss_task"], sum(weights)]
(folder / f"found{rank}.json").write_text(json.dumps(found))
leave_together(folder, rank)
