"""A run on paper, step by step: colocated, separate and asynchronous rollouts for a distribution of lengths. No torch.

lengths     how many tokens each completion has
decoding    seconds in which an engine generates a list of completions
schedule    who waits for whom, when each step's seconds on both sides are known
splits      the ways to divide N GPUs between trainer and rollout servers, each simulated
"""
