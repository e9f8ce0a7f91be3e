"""`hnf-attention doctor`: what this machine is, which engine each call takes and why, and self-tests."""

from .command import run

__all__ = ["run"]
