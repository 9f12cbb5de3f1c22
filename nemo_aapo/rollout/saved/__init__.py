"""Completions as files: those of a checkpoint, those that survive a kill, those for people, those to train on again."""
