"""Rollout servers, both sides: the trainer's engine over HTTP, and the service that answers it."""
