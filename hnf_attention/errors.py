"""The error that a user can put right."""


class InputError(ValueError):
    """The user's input is not usable. The message is one line that says why."""
