"""What this machine is: versions, extras, the card."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from ...engine import engines
from ...engine.card import Card, card_of, current_device
from ...versions import versions

# The extras that users install, as in setup.py: name -> packages.
EXTRAS = {
    "huggingface": ("transformers", "safetensors"),
    "trainer": ("transformers", "safetensors", "accelerate"),
    "lightning": ("lightning",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow-skinny",),
    "trackio": ("trackio",),
    "parquet": ("pyarrow",),
    "completion": ("shtab",),
}


def software() -> dict[str, str | None]:
    """Versions of Python, of the packages this project computes with, and of cuDNN; None if not installed."""
    found = versions("hnf-attention", "torch", "triton", "numpy")
    found["torch"] = str(torch.__version__)  # names its build, which the package's version leaves out
    found["cuda"] = torch.version.cuda
    found["cudnn"] = str(torch.backends.cudnn.version()) if torch.cuda.is_available() else None
    return found


def extras() -> dict[str, dict[str, str | None]]:
    """The version of each package of each extra; None if it is not installed."""
    found = versions(*dict.fromkeys(package for packages in EXTRAS.values() for package in packages))
    return {name: {package: found[package] for package in packages} for name, packages in EXTRAS.items()}


def extra_text(packages: dict[str, str | None]) -> str:
    """'transformers 5.0.0, safetensors not installed'"""
    return ", ".join(f"{package} {version or 'not installed'}" for package, version in packages.items())


def card_text() -> str:
    """The card's name, compute capability and memory, or that there is none."""
    card = card_of(current_device())
    if card.vendor is None:
        return "no CUDA card: attention runs in PyTorch, in chunks"
    return f"{card.name}, compute capability {card.compute}, {card.memory / 2**30:.0f} GiB"


def auto_text() -> str:
    """What mode="auto" does on this machine."""
    device = current_device()
    if card_of(device).vendor is None:
        return 'mode="auto" probes: needs a CUDA card'
    widths = ", ".join(map(str, engines.MEASURED_HEAD_DIMS))
    reason = engines.unmeasured_on(card_of(device))
    if reason is not None:
        return f'mode="auto" probes: fused attention is {reason}'
    return f'mode="auto" fuses plain fp16 and bf16 calls with head dimensions {widths}, and probes else'


def card_document() -> dict[str, Any] | None:
    """The card as JSON types; None if there is none."""
    card: Card = card_of(current_device())
    return None if card.vendor is None else {**asdict(card), "capability": card.compute}
