"""Training steps beside those of TRL's GRPOTrainer: the same checkpoint, prompts, lengths, batch and optimizer.

Each contestant is a process of its own, which takes one step when told to, so that the two sides take turns. TRL's have
.venv-peers on their path. Only one process computes at a time.
"""
