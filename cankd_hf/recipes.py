"""`python -m cankd_hf.recipes`."""

from cankd_hf.cli.recipes import main, parser

__all__ = ["main", "parser"]

if __name__ == "__main__":
    raise SystemExit(main())
