"""Distil strong vision models into small dense-prediction students (CanKD, WACV 2026)."""

__version__ = "0.1.0"
