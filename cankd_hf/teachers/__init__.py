"""Frozen models that a student learns from."""
