"""The in-process engine: batched decoding with the learner's own weights."""
