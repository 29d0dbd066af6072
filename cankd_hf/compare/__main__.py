"""`python -m cankd_hf.compare`."""

import sys

from cankd_hf.compare import main

if __name__ == "__main__":
    sys.exit(main())
