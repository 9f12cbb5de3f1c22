"""Rollout engines: the protocol that all of them keep, and engines by name."""
