"""Parsers, tables and the dry run of the commands."""
