"""`python -m cankd_hf.init`."""

from cankd_hf.cli.init import main, parser

__all__ = ["main", "parser"]

if __name__ == "__main__":
    raise SystemExit(main())
