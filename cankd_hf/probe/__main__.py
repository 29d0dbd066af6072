"""`python -m cankd_hf.probe`."""

import sys

from cankd_hf.probe import main

if __name__ == "__main__":
    sys.exit(main())
