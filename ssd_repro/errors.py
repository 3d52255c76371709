"""The one exception of bad input: its message is what the user reads."""


class InputError(ValueError):
    """Bad input: one clear sentence naming the value and what would be right (exit code 2)."""


def first_line(error: Exception) -> str:
    """The first line of another library's error, or the name of its kind."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
