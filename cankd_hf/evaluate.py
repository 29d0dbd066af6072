"""`python -m cankd_hf.evaluate`."""

from cankd_hf.cli.evaluate import main, parser

__all__ = ["main", "parser"]

if __name__ == "__main__":
    raise SystemExit(main())
