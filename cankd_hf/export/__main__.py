"""`python -m cankd_hf.export`."""

from __future__ import annotations

import sys

from cankd_hf.export import main

if __name__ == "__main__":
    sys.exit(main())
