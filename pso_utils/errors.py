"""The one kind of error that is shown to the user as a line; every other exception is a bug and keeps its traceback."""


class UserError(Exception):
    """What the user can mend. Its message is one line that says what is wrong and what to pass instead."""


def first_line(error: BaseException) -> str:
    """An exception's class and the first line of its message, to be quoted in a `UserError`."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]
