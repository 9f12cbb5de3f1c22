"""The loop, and what puts its parts together."""
