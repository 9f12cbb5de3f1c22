"""What a completion's answer is, how it reads, and whether it is the gold one: pure functions behind the verifiers."""
