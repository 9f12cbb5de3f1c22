"""Whole files, tables, background work, and quiet imports."""
