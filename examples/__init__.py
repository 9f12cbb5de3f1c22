"""Runs to look at: the quickstart and the study."""
