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
    Raises ValueError unless the recipes share their shape, and those with QK-norm come last.
    """

    def __init__(self, recipes: Sequence[Recipe], device: torch.device) -> None:
        super().__init__()
        if len({recipe.shape for recipe in recipes}) != 1:
            raise ValueError(f"expected recipes of one shape, got {len({r.shape for r in recipes})} shapes")
        if sorted(recipes, key=lambda recipe: recipe.qk_norm) != list(recipes):
            raise ValueError("expected the recipes with QK-norm behind the others")
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
        #: So many members come first that have no QK-norm; all others have it.
        self.plain = sum(not each.qk_norm for each in recipes)
        sharpness = torch.tensor([each.sharpness for each in recipes], device=device)
        self.register_buffer("sharpness", sharpness[:, None, None])
        scale = torch.tensor([each.logit_scale for each in recipes], device=device)
        self.register_buffer("logit_scale", scale[:, None, None])
        self.turns = None
        if self.recipe.positions == "rope":
            cosines, sines = rotary(self.recipe.context, self.recipe.head_dim)
            self.turns = cosines.to(device), sines.to(device)
        self.blocks = nn.ModuleList(_Block(self, number) for number in range(self.recipe.depth))

    def gradients(self, loss: Tensor) -> Tensor:
        """The gradient of all weights, (E, P)."""
        found = torch.autograd.grad(loss, list(self.weights.values()), materialize_grads=True)
        return torch.cat([part.flatten(1) for part in found], 1)

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
        logits = self.linear(["head"], hidden, "norm").flatten(1, 2)
        return logits * self.logit_scale.to(logits.dtype)

    def linear(self, names: Sequence[str], x: Tensor, norm: str | None = None) -> Tensor:
        """Projections side by side, (E, B, N, in) to (E, B, N, sum of out), behind a norm layer if one is named.

        The gains of the norm layer go into the weights, which are much smaller than what they would be applied to.
        """
        weights = [self._weight(name) for name in names]
        weight = (weights[0] if len(weights) == 1 else torch.cat(weights, 1)).transpose(1, 2)
        rows = x.flatten(1, 2)
        if norm is None:
            return torch.bmm(rows, weight).view(*x.shape[:3], -1)
        with torch.autocast(x.device.type, enabled=False):
            gained = weight * self.weights[f"{norm}.weight"][:, :, None]
            if self.recipe.norm == "rms":
                rows = F.rms_norm(rows.float(), rows.shape[-1:], eps=1e-6)
                bias = None
            else:
                rows = F.layer_norm(rows.float(), rows.shape[-1:])
                bias = torch.bmm(self.weights[f"{norm}.bias"][:, None], weight)
        found = torch.bmm(rows, gained) if bias is None else torch.baddbmm(bias, rows, gained)
        return found.view(*x.shape[:3], -1)

    def _weight(self, name: str) -> Tensor:
        """A projection's weight, (E, out, in); that of the queries holds the sharpness of members without QK-norm."""
        weight = self.weights[f"{name}.weight"]
        if not name.endswith("q_proj") or not self.plain:
            return weight
        return torch.cat([weight[: self.plain] * self.sharpness[: self.plain], weight[self.plain :]])


class _Block(nn.Module):
    def __init__(self, ensemble: Ensemble, number: int) -> None:
        super().__init__()
        self._whole = [ensemble]  # in a list: a module would become this one's child
        self._name = f"blocks.{number}"
        self.attention = _Attention(ensemble, f"blocks.{number}.attention")

    def forward(self, x: Tensor) -> Tensor:
        whole, name = self._whole[0], self._name
        x = x + self.attention(x)
        hidden = whole.linear([f"{name}.mlp.up_proj"], x, f"{name}.mlp_norm")
        if whole.recipe.norm == "rms":
            gate, hidden = hidden.chunk(2, -1)
            hidden = F.silu(gate) * hidden
        else:
            hidden = F.gelu(hidden)
        return x + whole.linear([f"{name}.mlp.down_proj"], hidden)


class _Attention(nn.Module):
    """Attention of the residual stream, its norm layer included."""

    def __init__(self, ensemble: Ensemble, name: str) -> None:
        super().__init__()
        self._whole, self._name = [ensemble], name

    def forward(self, x: Tensor) -> Tensor:
        whole, name = self._whole[0], self._name
        recipe = whole.recipe
        joined = whole.linear([f"{name}.{part}_proj" for part in "qkv"], x, f"{name}_norm")
        sizes = [recipe.heads, recipe.kv_heads, recipe.kv_heads]
        q, k, v = joined.unflatten(-1, (-1, recipe.head_dim)).split(sizes, -2)  # (E, B, N, H, D) each
        q, k = self._qk_norm(q, "q"), self._qk_norm(k, "k")
        v = _by_heads(v)
        if whole.turns is not None:
            q, k = rotate(q, whole.turns), rotate(k, whole.turns)
        grouped = recipe.kv_heads != recipe.heads
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        mixed = mixed.unflatten(1, (-1, recipe.heads)).permute(1, 0, 3, 2, 4).flatten(3)
        return whole.linear([f"{name}.out_proj"], mixed)

    def _qk_norm(self, x: Tensor, part: str) -> Tensor:
        """(B, E * H, N, D) of (E, B, N, H, D), normalised for the members that have QK-norm."""
        whole = self._whole[0]
        plain = whole.plain
        if plain == len(x):
            return _by_heads(x)
        gain = whole.weights[f"{self._name}.{part}_norm.weight"][plain:]
        if part == "q":
            gain = gain * whole.sharpness[plain:, 0]
        with torch.autocast(x.device.type, enabled=False):
            normed = F.rms_norm(x[plain:].float(), x.shape[-1:], eps=1e-6) * gain[:, None, None, None]
        normed = normed.to(x.dtype)
        return torch.cat([_by_heads(x[:plain]), _by_heads(normed)], 1) if plain else _by_heads(normed)


def _by_heads(x: Tensor) -> Tensor:
    """(B, E * H, N, D) of (E, B, N, H, D)."""
    return x.permute(1, 0, 3, 2, 4).flatten(1, 2)
