"""The end of a run's time."""


class OutOfTime(RuntimeError):
    """The deadline came before the run ended."""
