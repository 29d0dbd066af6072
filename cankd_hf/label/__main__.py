"""`python -m cankd_hf.label`."""

import sys

from cankd_hf.label import main

if __name__ == "__main__":
    sys.exit(main())
