"""The one exception of bad input: its message is what the user reads."""


class InputError(ValueError):
    """Bad input: one clear sentence naming the value and what would be right (exit code 2)."""
