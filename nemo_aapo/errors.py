"""Errors that end a run with a message instead of a traceback; scripts exit with 1 after one of them."""


class RunError(RuntimeError):
    """Something that a person has to look at. The message says what, where and what to do."""
