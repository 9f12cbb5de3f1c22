"""``rollout.refit=collective``: the trainer's ranks send weights straight into those of the servers, part by part."""
