"""The work that a command starts: training, evaluating, filling the reference store."""
