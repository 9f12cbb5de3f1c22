"""Tests of where the time of a step goes."""
