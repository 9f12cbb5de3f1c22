"""What a completion's answer is, how it reads, and whether it is the gold one: pure functions behind the verifiers."""

from __future__ import annotations

RULES = 4
"""Number that rises when these rules come to judge an answer otherwise: stored reference rewards belong to one."""
