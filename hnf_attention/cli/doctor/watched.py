"""A small model that is measured while it runs, against the fp64 reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...engine.card import current_device
from ...monitoring.analyzer import AttentionAnalyzer
from ...reference import attention as reference
from .self_test import STATISTICS_TOLERANCE, options_of

_LAYERS, _HEADS, _HEAD_DIM, _BATCH, _LENGTH = 2, 2, 16, 2, 48


@dataclass(frozen=True)
class Watched:
    """What came of measuring a small model beside its own attention, mode "probe".

    layers: how many of the model's were measured. expected: how many it has.
    unchanged: whether the model's output was the same to the last bit.
    errors: statistic of a head -> its largest absolute error, nats or shares.
    """

    layers: int
    expected: int
    unchanged: bool
    errors: dict[str, float]

    @property
    def passed(self) -> bool:
        # Written so that NaN fails.
        exact = all(error <= STATISTICS_TOLERANCE for error in self.errors.values())
        return self.layers == self.expected and self.unchanged and exact

    def to_dict(self) -> dict[str, Any]:
        """JSON types. A number that is not finite is None."""
        errors = {name: error if math.isfinite(error) else None for name, error in self.errors.items()}
        return {
            "layers_measured": self.layers,
            "layers": self.expected,
            "output_unchanged": self.unchanged,
            "errors": errors,
            "passed": self.passed,
        }


class _Layer(nn.Module):
    """Causal self-attention, (B, N, C) to (B, N, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(_HEADS * _HEAD_DIM, 3 * _HEADS * _HEAD_DIM)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, (B, H, N, D) each."""
        query, key, value = self.qkv(x).unflatten(-1, (3, _HEADS, _HEAD_DIM)).permute(2, 0, 3, 1, 4)
        return query, key, value

    def forward(self, x: Tensor) -> Tensor:
        return x + F.scaled_dot_product_attention(*self.project(x), is_causal=True).transpose(1, 2).flatten(2)


@torch.no_grad()
def watch() -> Watched:
    """Run the model unmeasured and measured, and compare."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(*(_Layer() for _ in range(_LAYERS))).to(current_device())
        x = torch.randn(_BATCH, _LENGTH, _HEADS * _HEAD_DIM).to(current_device())
    plain = model(x)
    with AttentionAnalyzer(model, mode="probe") as analyzer:
        measured = model(x)
        found = list(analyzer.diagnose().stats.values())
    errors = dict.fromkeys(("entropy", "max_logit", "min_logit"), 0.0)
    for layer, stats in zip(model, found):
        for name, true in _expected(layer, x).items():
            got = torch.as_tensor(getattr(stats, name), dtype=torch.float64)
            # A maximum that a NaN survives.
            errors[name] = float(torch.stack([(got - true).abs().max(), torch.tensor(errors[name])]).max())
        x = layer(x)
    return Watched(len(found), _LAYERS, torch.equal(plain, measured), errors)


def _expected(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The head statistics of the layer's attention to x, (H,) fp64 on the CPU."""
    assert isinstance(layer, _Layer)
    query, key, _ = (side.double() for side in layer.project(x))
    rows = reference.attention(query, key, None, options_of(query, True))[1]
    heads = {
        "entropy": rows.entropy.mean((0, 2)),
        "max_logit": rows.max_logit.amax((0, 2)),
        "min_logit": rows.min_logit.amin((0, 2)),
    }
    return {name: value.double().cpu() for name, value in heads.items()}
