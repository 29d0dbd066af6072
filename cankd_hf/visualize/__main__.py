"""`python -m cankd_hf.visualize`."""

from __future__ import annotations

import sys

from cankd_hf.visualize import main

if __name__ == "__main__":
    sys.exit(main())
