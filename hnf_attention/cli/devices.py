"""The device that `--device` names."""

from __future__ import annotations

import torch

from ..errors import InputError

_KNOWN = "cpu, cuda, cuda:N or mps"


def device_of(name: str) -> torch.device:
    """The device of that name. Raises InputError for an unknown name, and for a device that this machine lacks."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"expected --device {_KNOWN}, got {name}") from error
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= found:
            raise InputError(
                f"expected a CUDA device for --device {name}, got a machine with {found or 'none'}"
            )
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise InputError("expected an Apple GPU for --device mps, got a machine without one")
    elif device.type != "cpu":
        raise InputError(f"expected --device {_KNOWN}, got {name}")
    return device
