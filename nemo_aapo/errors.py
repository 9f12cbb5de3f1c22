"""Errors that end a run with a message instead of a traceback (scripts exit with 1 then), and messages of others."""


class RunError(RuntimeError):
    """Something that a person has to look at. The message says what, where and what to do."""


def one_line(said: object) -> str:
    """An error or a text, its lines joined by semicolons."""
    return "; ".join(line.strip() for line in str(said).splitlines() if line.strip())


def first_line(error: BaseException) -> str:
    """Of the error's text; of one that says nothing, its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
