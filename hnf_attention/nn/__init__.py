"""Drop-in modules that keep the statistics of what they compute."""

from .multihead import MultiheadAttention

__all__ = ["MultiheadAttention"]
