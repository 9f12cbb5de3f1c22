"""Ranks and their groups: who talks to whom, and one outcome for all of them."""
