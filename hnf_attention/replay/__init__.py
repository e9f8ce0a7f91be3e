"""One training step, run again under observation, to find where NaN or inf begins."""

from .trace import trace_non_finite

__all__ = ["trace_non_finite"]
