"""Scoring in processes that can be killed: the pool, its workers, and the channel between them."""
