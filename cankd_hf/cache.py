"""`python -m cankd_hf.cache`."""

from cankd_hf.cli.cache import main, parser

__all__ = ["main", "parser"]

if __name__ == "__main__":
    raise SystemExit(main())
