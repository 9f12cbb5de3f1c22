"""Algorithms of one's own, each in a file of less than forty lines; docs/guide/algorithms.md explains them."""
