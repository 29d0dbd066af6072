"""`python -m cankd_hf.compare.child KIND FILE PARENT`: what a comparison runs in processes of their own.

KIND is `train`, with a recipe, or `calibrate`; PARENT is the number of the process of the comparison.

They end with the comparison, however that ends: nothing goes on behind the back of its next start.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


def main(argv: list[str]) -> int:
    """Runs the train command, or the calibration. Returns the exit code."""
    kind, file, parent = argv
    threading.Thread(target=_end_with, args=(int(parent),), daemon=True).start()
    if kind == "train":
        from cankd_hf.cli import train

        return train.main([file])
    from cankd_hf.commands import console, exit_code
    from cankd_hf.compare.calibrate import calibrate
    from cankd_hf.host import keep_memory
    from cankd_hf.runs.record import write_json

    def measured() -> int:
        keep_memory()  # as the runs do
        spec = json.loads(Path(file).read_text(encoding="utf-8"))
        write_json(Path(spec.pop("output")), calibrate(**spec, say=console().print))
        return 0

    return exit_code(measured)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
