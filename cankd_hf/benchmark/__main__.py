"""`python -m cankd_hf.benchmark`."""

from __future__ import annotations

import sys

from cankd_hf.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
