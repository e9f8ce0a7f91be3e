"""The error of the command line."""


class InputError(ValueError):
    """What the user gave cannot be worked with; the message is one line that says why."""
