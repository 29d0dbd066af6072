"""`python -m cankd_hf.doctor`."""

from cankd_hf.cli.doctor import main, parser

__all__ = ["main", "parser"]

if __name__ == "__main__":
    raise SystemExit(main())
