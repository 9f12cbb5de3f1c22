"""A run as one page that needs nothing else: what it is, its curves, its completions, and what to look at."""
