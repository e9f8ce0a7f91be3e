"""Many models of one architecture that train side by side, one kernel launch for all of them.

Member e's query head h is head e * H + h of one attention call of E * H heads. Head statistics are folded for each head
alone, so one recorder sees all members at once, and each member's columns are what it would see of that model alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model import GPT, rotary, rotate
from .recipes import Recipe
from .text import VOCABULARY


class Ensemble(nn.Module):
    """E members: bytes (E, B, N) to logits (E, B * N, 256).

    flat: all weights, fp32 (E, P); the parameters are views of it.
    Raises ValueError unless the recipes share their shape.
    """

    def __init__(self, recipes: Sequence[Recipe], device: torch.device) -> None:
        super().__init__()
        if len({recipe.shape for recipe in recipes}) != 1:
            raise ValueError(f"expected recipes of one shape, got {len({r.shape for r in recipes})} shapes")
        self.recipe = recipes[0]
        members = [dict(GPT(replace(each, qk_norm=True)).named_parameters()) for each in recipes]
        self.shapes = {name: p.shape for name, p in members[0].items()}
        self.flat = torch.stack([torch.cat([p.detach().flatten() for p in m.values()]) for m in members])
        self.flat = self.flat.to(device)
        self.columns: dict[str, slice] = {}
        self.weights: dict[str, nn.Parameter] = {}
        at = 0
        for name, shape in self.shapes.items():
            self.columns[name] = slice(at, at + shape.numel())
            at += shape.numel()
            view = self.flat[:, self.columns[name]].view(len(recipes), *shape)
            self.weights[name] = nn.Parameter(view)
        normed = [each.qk_norm for each in recipes]
        self.all_normed, self.any_normed = all(normed), any(normed)
        column = torch.tensor(normed, device=device)[:, None, None, None, None]
        self.register_buffer("normed", column)
        self.register_buffer("sharpness", self._column(recipes, "sharpness", 5, device))
        self.register_buffer("logit_scale", self._column(recipes, "logit_scale", 3, device))
        self.turns = None
        if self.recipe.positions == "rope":
            cosines, sines = rotary(self.recipe.context, self.recipe.head_dim)
            self.turns = cosines.to(device), sines.to(device)
        self.blocks = nn.ModuleList(_Block(self, number) for number in range(self.recipe.depth))

    def gradients(self, loss: Tensor) -> Tensor:
        """The gradient of all weights, (E, P)."""
        found = torch.autograd.grad(loss, list(self.weights.values()), materialize_grads=True)
        return torch.cat([part.flatten(1) for part in found], 1)

    @staticmethod
    def _column(recipes: Sequence[Recipe], name: str, dims: int, device: torch.device) -> Tensor:
        values = torch.tensor([getattr(each, name) for each in recipes], device=device, dtype=torch.float32)
        return values.view(-1, *[1] * (dims - 1))

    def forward(self, x: Tensor) -> Tensor:
        members, batch, length = x.shape
        with torch.autocast(x.device.type, enabled=False):
            chosen = F.one_hot(
                x.flatten(1), VOCABULARY
            ).float()  # a product, whose gradient adds up in one order
            hidden = chosen @ self.weights["bytes.weight"]
        hidden = hidden.view(members, batch, length, -1)
        if self.recipe.positions == "learned":
            hidden = hidden + self.weights["positions.weight"][:, None, :length]
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.linear("head", self.normalized("norm", hidden)).flatten(1, 2)
        return logits * self.logit_scale.to(logits.dtype)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """(E, B, N, in) to (E, B, N, out)."""
        found = torch.bmm(x.flatten(1, 2), self.weights[f"{name}.weight"].transpose(1, 2))
        return found.view(*x.shape[:3], -1)

    def normalized(self, name: str, x: Tensor) -> Tensor:
        """LayerNorm or RMSNorm of (E, B, N, d) with each member's own gains."""
        gain = self.weights[f"{name}.weight"][:, None, None]
        with torch.autocast(x.device.type, enabled=False):
            if self.recipe.norm == "rms":
                return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6) * gain
            return F.layer_norm(x.float(), x.shape[-1:]) * gain + self.weights[f"{name}.bias"][:, None, None]


class _Block(nn.Module):
    def __init__(self, ensemble: Ensemble, number: int) -> None:
        super().__init__()
        self._whole = [ensemble]  # in a list: a module would become this one's child
        self._name = f"blocks.{number}"
        self.attention = _Attention(ensemble, f"blocks.{number}.attention")

    def forward(self, x: Tensor) -> Tensor:
        whole, name = self._whole[0], self._name
        x = x + self.attention(whole.normalized(f"{name}.attention_norm", x))
        hidden = whole.linear(f"{name}.mlp.up_proj", whole.normalized(f"{name}.mlp_norm", x))
        if whole.recipe.norm == "rms":
            gate, hidden = hidden.chunk(2, -1)
            hidden = F.silu(gate) * hidden
        else:
            hidden = F.gelu(hidden)
        return x + whole.linear(f"{name}.mlp.down_proj", hidden)


class _Attention(nn.Module):
    def __init__(self, ensemble: Ensemble, name: str) -> None:
        super().__init__()
        self._whole, self._name = [ensemble], name

    def forward(self, x: Tensor) -> Tensor:
        whole, name = self._whole[0], self._name
        recipe = whole.recipe
        # (E, B, N, H, D) each
        q, k, v = (
            whole.linear(f"{name}.{part}_proj", x).unflatten(-1, (-1, recipe.head_dim)) for part in "qkv"
        )
        if whole.any_normed:
            q, k = self._qk_norm(q, "q"), self._qk_norm(k, "k")
        q = q * whole.sharpness.to(q.dtype)
        # (B, E * H, N, D) each
        q, k, v = (part.permute(1, 0, 3, 2, 4).flatten(1, 2) for part in (q, k, v))
        if whole.turns is not None:
            q, k = rotate(q, whole.turns), rotate(k, whole.turns)
        grouped = recipe.kv_heads != recipe.heads
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        mixed = mixed.unflatten(1, (-1, recipe.heads)).permute(1, 0, 3, 2, 4).flatten(3)
        return whole.linear(f"{name}.out_proj", mixed)

    def _qk_norm(self, x: Tensor, part: str) -> Tensor:
        whole = self._whole[0]
        gain = whole.weights[f"{self._name}.{part}_norm.weight"][:, None, None, None]
        with torch.autocast(x.device.type, enabled=False):
            found = (F.rms_norm(x.float(), x.shape[-1:], eps=1e-6) * gain).to(x.dtype)
        return found if whole.all_normed else torch.where(whole.normed, found, x)
