"""The card that a call runs on: vendor, compute capability, memory, Triton's version."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NVIDIA, AMD = "NVIDIA", "AMD"
NO_CARD = "needs a CUDA card"  # why no kernel takes tensors of another device
_HERE = nullcontext()


@dataclass(frozen=True, eq=False)  # `card_of` makes one a device, which is quick to hash by its identity
class Card:
    """One device. A CPU, or any device that is not CUDA's or ROCm's, has no vendor.

    capability: compute capability, (major, minor). memory: bytes. triton: its version; None if it is not installed.
    has_flash, has_cudnn: whether this PyTorch offers FlashAttention's kernels, and cuDNN's, on the device. PyTorch
    calls ROCm's MIOpen cuDNN, too: it does not count here. cudnn_version: (major, minor).
    """

    name: str
    vendor: str | None = None
    capability: tuple[int, int] = (0, 0)
    memory: int = 0
    triton: str | None = None
    has_flash: bool = False
    has_cudnn: bool = False
    cudnn_version: tuple[int, int] = (0, 0)

    @property
    def compute(self) -> str:
        """The compute capability as it is usually written, "9.0"."""
        return ".".join(str(number) for number in self.capability)


@functools.cache
def card_of(device: torch.device) -> Card:
    """What is known about a device."""
    if device.type != "cuda":
        return Card(device.type)
    properties = torch.cuda.get_device_properties(device)
    vendor = NVIDIA if torch.version.hip is None else AMD
    has_cudnn = vendor == NVIDIA and torch.backends.cudnn.is_available()
    return Card(
        properties.name,
        vendor,
        (properties.major, properties.minor),
        properties.total_memory,
        _triton_version(),
        torch.backends.cuda.is_flash_attention_available(),
        has_cudnn,
        _cudnn_version() if has_cudnn else (0, 0),
    )


def current_device() -> torch.device:
    """The CUDA device that is current, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def on_device(query: Tensor) -> AbstractContextManager[Any]:
    """Make the query's CUDA device current, for Triton launches there."""
    # Entering a device costs host time, even if it is current.
    index = query.device.index
    return _HERE if index == torch.cuda.current_device() else torch.cuda.device(index)


def _cudnn_version() -> tuple[int, int]:
    """(9, 19) of the number 91900; before cuDNN 9 a number had one digit less for the major version."""
    number = torch.backends.cudnn.version() or 0
    major = number // (10_000 if number >= 90_000 else 1_000)
    return major, number // 100 % (100 if number >= 90_000 else 10)


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__
