"""Attention layers whose weights lie, or work, in many ways under the usual names."""

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, HEADS, DIM = 32, 4, 8
#: How a fused projection's rows are viewed: (B, N, 3 * WIDTH) to q, k and v of (B, H, N, D) each.
ORDERS = {
    "kinds, heads": lambda t: t.unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4),
    "heads, kinds": lambda t: t.unflatten(-1, (HEADS, 3, DIM)).permute(3, 0, 2, 1, 4),
    "kinds, dimensions, heads": lambda t: t.unflatten(-1, (3, DIM, HEADS)).permute(2, 0, 4, 1, 3),
    "dimensions, kinds, heads": lambda t: t.unflatten(-1, (DIM, 3, HEADS)).permute(3, 0, 4, 1, 2),
    "heads, dimensions, kinds": lambda t: t.unflatten(-1, (HEADS, DIM, 3)).permute(4, 0, 2, 1, 3),
    "kinds backwards": lambda t: t.unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4).flip(0),
    "heads backwards": lambda t: t.unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4).flip(2),
    "keys' heads rolled": lambda t: _rolled(t.unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)),
}


def _rolled(qkv):
    q, k, v = qkv
    return q, k.roll(1, 1), v


class Fused(nn.Module):
    """One projection under the name `name`. inside(module, q, k): what happens to q and k on the way."""

    def __init__(self, order="kinds, heads", inside=None, name="qkv", softmax=False, **options):
        super().__init__()
        self.order, self.inside, self.name, self.softmax, self.options = order, inside, name, softmax, options
        self.num_heads = HEADS
        self.add_module(name, nn.Linear(WIDTH, 3 * WIDTH))
        self.proj = nn.Linear(WIDTH, WIDTH)

    def parts(self, x):
        q, k, v = ORDERS[self.order](self.get_submodule(self.name)(x))
        q, k = (q, k) if self.inside is None else self.inside(self, q, k)
        return q, k, v

    def attend(self, q, k, v):
        if not self.softmax:
            return F.scaled_dot_product_attention(q, k, v, **self.options)
        return (q @ k.transpose(-1, -2) * DIM**-0.5).softmax(-1) @ v

    def forward(self, x):
        return self.proj(self.attend(*self.parts(x)).transpose(1, 2).flatten(2))


class Separate(Fused):
    """Projections apart, `groups` heads of keys and values; the queries' has `rows` rows."""

    def __init__(self, groups=HEADS, rows=WIDTH, **options):
        super().__init__(**options)
        del self.qkv
        self.groups = groups
        self.q_proj = nn.Linear(WIDTH, rows)
        self.k_proj, self.v_proj = nn.Linear(WIDTH, groups * DIM), nn.Linear(WIDTH, groups * DIM)

    def parts(self, x):
        q, k, v = (
            p(x).unflatten(-1, (-1, DIM)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (q, k) if self.inside is None else self.inside(self, q, k)
        return q, *(y.repeat_interleave(HEADS // self.groups, 1) for y in (k, v))


class Cross(Separate):
    """Keys and values of another sequence."""

    def forward(self, x, context):
        (q, _, _), (_, k, v) = self.parts(x), self.parts(context)
        return self.attend(q, k, v).transpose(1, 2).flatten(2)


class Biased(Fused):
    """A learned bias on every head's scores before a softmax of its own, and a projection that starts at zero."""

    def __init__(self):
        super().__init__()
        self.slopes = nn.Parameter(torch.tensor([1.0, 0.5, 0.25, 0.125]))
        nn.init.zeros_(self.proj.weight)

    def attend(self, q, k, v):
        n = q.shape[2]
        distance = torch.arange(n) - torch.arange(n)[:, None]
        scores = q @ k.transpose(-1, -2) * DIM**-0.5 + self.slopes.view(-1, 1, 1) * distance
        return scores.masked_fill(distance > 0, -torch.inf).softmax(-1) @ v


class Gated(Separate):
    """q_proj holds the queries and a gate: beside those of each head, or all of it after them."""

    def __init__(self, inner=True, gate="own", **options):
        super().__init__(rows=2 * WIDTH, **options)
        self.inner, self.gate = inner, gate

    def parts(self, x):
        return self._parts(x)[:3]

    def _parts(self, x):
        rows = self.q_proj(x)
        if self.inner:
            q, gate = rows.unflatten(-1, (HEADS, 2 * DIM)).chunk(2, -1)
        else:
            q, gate = (y.unflatten(-1, (HEADS, DIM)) for y in rows.chunk(2, -1))
        k, v = (p(x).unflatten(-1, (-1, DIM)).transpose(1, 2) for p in (self.k_proj, self.v_proj))
        return q.transpose(1, 2), k, v, q if self.gate == "queries" else gate

    def forward(self, x):
        q, k, v, gate = self._parts(x)
        out = self.attend(q, k, v).transpose(1, 2)
        return self.proj((out * gate.sigmoid()).flatten(2))


class Grouped(Fused):
    """The rows of a key head's queries, then its own and its values', then the next one's."""

    def __init__(self, groups, **options):
        super().__init__(name="query_key_value", **options)
        self.num_kv_heads = groups
        self.query_key_value = nn.Linear(WIDTH, (HEADS + 2 * groups) * DIM)

    def parts(self, x):
        groups, per = self.num_kv_heads, HEADS // self.num_kv_heads
        rows = self.query_key_value(x).unflatten(-1, (groups, per + 2, DIM))
        q = rows[..., :per, :].flatten(2, 3).transpose(1, 2)
        return q, *(rows[..., per + i, :].repeat_interleave(per, 2).transpose(1, 2) for i in (0, 1))


class Latent(Fused):
    """Multi-head latent attention: keys from a latent, and a rotary part whose keys all heads share."""

    def __init__(self, latent_queries=False, **options):
        super().__init__(**options)
        del self.qkv
        self.qk_nope_head_dim, self.qk_rope_head_dim = DIM, 4
        self.latent_queries = latent_queries
        rows = HEADS * (DIM + 4)
        if latent_queries:
            self.q_a_proj, self.q_a_layernorm = nn.Linear(WIDTH, 16), nn.RMSNorm(16)
            self.q_b_proj = nn.Linear(16, rows)
        else:
            self.q_proj = nn.Linear(WIDTH, rows)
        self.kv_a_proj_with_mqa, self.kv_a_layernorm = nn.Linear(WIDTH, 16 + 4), nn.RMSNorm(16)
        self.kv_b_proj = nn.Linear(16, HEADS * 2 * DIM)

    def parts(self, x):
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.latent_queries else self.q_proj(x)
        latent, rotary = self.kv_a_proj_with_mqa(x).split([16, 4], -1)
        k, v = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (HEADS, 2 * DIM)).chunk(2, -1)
        k = torch.cat([k, rotary.unsqueeze(2).expand(-1, -1, HEADS, -1)], -1)
        return q.unflatten(-1, (HEADS, DIM + 4)).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class Reused(Separate):
    """Its `what` is another use of the queries or keys."""

    def __init__(self, what, **options):
        super().__init__(**options)
        self.what = what

    def forward(self, x):
        q, k, v = self.parts(x)
        v = k if self.what == "values" else v
        out = self.attend(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(out) + (self.q_proj(x) if self.what == "residual" else 0)


class Twice(Fused):
    """Two attentions with the same queries and keys."""

    def forward(self, x):
        q, k, v = self.parts(x)
        return (self.attend(q, k, v) + self.attend(q, k, -v.flip(2))).transpose(1, 2).flatten(2)


class Softcapped(Fused):
    """tanh over scores."""

    def attend(self, q, k, v):
        return (2 * torch.tanh(q @ k.transpose(-1, -2) / 2)).softmax(-1) @ v


class TwoArguments(Fused):
    """Its forward needs something that is no sequence."""

    def forward(self, x, table):
        return super().forward(x) + table["offset"]


def rotated(module, q, k):
    """Rotary positions."""
    angle = torch.arange(q.shape[2])[:, None] * 10.0 ** -torch.arange(DIM // 2)

    def turn(x):
        (a, b), c, s = x.chunk(2, -1), angle.cos(), angle.sin()
        return torch.cat([a * c - b * s, a * s + b * c], -1).to(x.dtype)

    return turn(q), turn(k)


def normed(module, q, k):
    """By a function call."""
    return F.rms_norm(q, (DIM,)), F.rms_norm(k, (DIM,))


def cosine(module, q, k):
    return 8 * F.normalize(q, dim=-1), F.normalize(k, dim=-1)


def queries_normed(module, q, k):
    return F.rms_norm(q, (DIM,)), k


def keys_normed(module, q, k):
    return q, F.layer_norm(k, (DIM,))


def all_heads_normed(module, q, k):
    """Over all heads at once, as in OLMo 2."""
    return tuple(
        F.rms_norm(y.transpose(1, 2).flatten(2), (WIDTH,)).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        for y in (q, k)
    )


def clamped(module, q, k):
    """As DBRX and OLMo clip."""
    return q.clamp(-0.5, 0.5), k.clamp(-0.5, 0.5)


def shifted(module, q, k):
    """Queries with a learned part of their own beside the projection's."""
    return q + module.proj.weight[0, :DIM], k


class Norm(nn.Module):
    """Both norms in one module, under names of its own."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.RMSNorm(DIM), nn.RMSNorm(DIM)

    def forward(self, q, k):
        return self.one(q), self.other(k)


class WithModule(Fused):
    """QK-norm in a module under any name."""

    def __init__(self, name, module, **options):
        super().__init__(inside=lambda self, q, k: self.run(q, k), **options)
        self.where = name
        self.add_module(name, module)

    def run(self, q, k):
        module = self.get_submodule(self.where)
        if isinstance(module, Norm):
            return module(q, k)
        one, other = (module[0], module[1]) if isinstance(module, nn.ModuleList) else (module, module)
        return one(q), other(k)
