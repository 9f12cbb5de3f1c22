"""Weights that other processes of the same machine read where the trainer holds them: ``rollout.refit=ipc``."""
