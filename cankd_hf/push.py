"""`python -m cankd_hf.push`."""

from cankd_hf.cli.push import main, parser

__all__ = ["main", "parser"]

if __name__ == "__main__":
    raise SystemExit(main())
