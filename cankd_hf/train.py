"""`python -m cankd_hf.train`."""

from cankd_hf.cli.train import main, parser

__all__ = ["main", "parser"]

if __name__ == "__main__":
    raise SystemExit(main())
