"""Example runs: the quickstart and the study."""
