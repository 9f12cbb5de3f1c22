"""The built-in algorithms, each a file of its own in the form that a user's own has."""
