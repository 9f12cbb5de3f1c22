"""Groups in, optimizer steps out: micro-batches, log-probs, and the policy that is trained."""
