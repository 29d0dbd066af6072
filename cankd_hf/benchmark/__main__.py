"""`python -m cankd_hf.benchmark`."""

import sys

from cankd_hf.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
