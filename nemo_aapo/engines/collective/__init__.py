"""Weights that the trainer's ranks send straight into those of the servers: ``rollout.refit=collective``."""
