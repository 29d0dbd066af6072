"""`python -m cankd_hf.export`."""

import sys

from cankd_hf.export import main

if __name__ == "__main__":
    sys.exit(main())
