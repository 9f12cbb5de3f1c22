"""Training steps beside those of TRL's GRPOTrainer: the same checkpoint, prompts, lengths, batch and optimizer.

Each contestant is a process of its own that takes one step when it is ordered to, so that the two sides take turns and
only one process computes at a time. TRL's contestants have .venv-peers on their path.
"""
