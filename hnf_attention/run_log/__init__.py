"""A run on disk: what a monitor saw, from the first step to the last, in a file that can be read while it grows."""

from .blocks import BadLog
from .reader import RunLog
from .writer import RunLogWriter

__all__ = ["BadLog", "RunLog", "RunLogWriter"]
