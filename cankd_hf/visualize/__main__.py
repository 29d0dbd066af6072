"""`python -m cankd_hf.visualize`."""

import sys

from cankd_hf.visualize import main

if __name__ == "__main__":
    sys.exit(main())
