"""The quickstart's task and tiny base model: sums of two two-digit numbers."""
