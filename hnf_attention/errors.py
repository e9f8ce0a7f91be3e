"""The error that is the user's to put right."""


class InputError(ValueError):
    """What the user gave cannot be worked with; the message is one line that says why."""
