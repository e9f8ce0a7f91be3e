"""`hnf-attention demo`: break a small transformer, warn before the loss shows it, and treat it."""

from .command import run, run_demo
from .training import Config

__all__ = ["Config", "run", "run_demo"]
