"""`python -m cankd_hf.convert`."""

import sys

from cankd_hf.convert import main

if __name__ == "__main__":
    sys.exit(main())
