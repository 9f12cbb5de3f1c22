"""Checkpoints that are whole or not there: what is saved, when, in which format, and how damage is found."""
