"""The small study: algorithms compared on the quickstart's task, over several seeds with the same budget."""
