"""`python -m cankd_hf.data`."""

import sys

from cankd_hf.cli.data import main

if __name__ == "__main__":
    sys.exit(main())
