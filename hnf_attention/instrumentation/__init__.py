"""How a model's attention is reached: Hugging Face's attention interface and PyTorch's SDPA."""

from .coverage import Coverage
from .handle import Instrumentation, instrument
from .measurement import Measurement

__all__ = ["Coverage", "Instrumentation", "Measurement", "instrument"]
