"""What the demo trains: a small byte-level GPT, on the source code of Python's standard library."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import InputError

VOCABULARY = 256  # bytes
TEXT_BYTES = 2_000_000  # that runs train on
HELD_OUT_BYTES = 100_000  # after those
HELD_OUT_WINDOWS, _HELD_OUT_BATCH, _HELD_OUT_SEED = 1_536, 128, 1


class Attention(nn.Module):
    """Causal self-attention; `sharpness` multiplies the usual scale of D ** -0.5 (1 / temperature)."""

    def __init__(self, width: int, heads: int, sharpness: float):
        super().__init__()
        self.heads = heads
        self.scale = sharpness * (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, N, D) each
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """A pre-norm layer: attention, then an MLP of four times the width."""

    def __init__(self, width: int, heads: int, sharpness: float):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, sharpness)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Pre-norm decoder with learned positions: bytes (B, N) to logits (B, N, 256)."""

    def __init__(self, layers: int, width: int, heads: int, context: int, sharpness: float):
        super().__init__()
        self.bytes = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, sharpness) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bytes(x) + self.positions.weight[: x.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def standard_library_text(limit: int = TEXT_BYTES) -> Tensor:
    """The first `limit` bytes of this interpreter's standard library, its files in name order: (limit,) uint8.

    Raises InputError if the interpreter comes without its sources.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = bytearray()
    for path in sorted(folder.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= limit:
            break
    if len(text) < limit:
        raise InputError(
            f"expected {limit} bytes of standard library sources in {folder}, got {len(text)}: "
            "this Python comes without them"
        )
    return torch.frombuffer(text[:limit], dtype=torch.uint8)


def batches(text: Tensor, batch_size: int, context: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random windows, the same for the same seed: inputs and next bytes, (batch_size, context) int64 each."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(context + 1)
    while True:
        starts = torch.randint(len(text) - context, (batch_size, 1), generator=generator)
        windows = text[starts + offsets].long()
        yield windows[:, :-1], windows[:, 1:]


@torch.no_grad()
def held_out_loss(model: nn.Module, text: Tensor, context: int) -> float:
    """Mean loss in nats per byte over HELD_OUT_WINDOWS windows of a text, (bytes,) uint8: the same for all models."""
    device = next(model.parameters()).device
    windows = batches(text, _HELD_OUT_BATCH, context, _HELD_OUT_SEED)
    found = []
    for inputs, targets in islice(windows, HELD_OUT_WINDOWS // _HELD_OUT_BATCH):
        logits = model(inputs.to(device))
        found.append(F.cross_entropy(logits.flatten(0, 1), targets.to(device).flatten()).item())
    return fmean(found)
