"""Scores that weights allow, from a checkpoint alone: a bound that holds for any data, and what to expect.

A head's query is q = A x + a, its key k = B y + b, where x and y are two tokens as the norm layer in front
normalises them, before its gain: |x| <= sqrt(width), zero mean under LayerNorm. That layer's gain and bias are
folded in: A = W_q diag(gain) (I - 1 1^T / width, under LayerNorm), a = W_q bias + b_q. Scores s = scale q.k, nats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Norms are computed in fp64, but a model multiplies in less. This share of the bound covers that, and the norm
# layer's rounding. 2^-6 covers bf16 activations (two roundings of 2^-8 on each side).
ROUNDING = {torch.float32: 2.0**-18, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-6}


@dataclass(frozen=True)
class Norm:
    """A norm layer: x -> gain * n(x) + bias, |n(x)| <= sqrt(width); centred (LayerNorm) or not (RMSNorm)."""

    gain: Tensor
    bias: Tensor
    centred: bool

    @property
    def limit(self) -> float:
        """Largest |output|: max|gain| sqrt(width) + |bias|."""
        width = self.gain.numel()
        return float(self.gain.double().abs().max() * width**0.5 + self.bias.double().norm())


@dataclass(frozen=True)
class HeadWeights:
    """One layer's folded projections, fp64: query (H, D, width), key (H_kv, D, width), and (H, D), (H_kv, D)."""

    query: Tensor
    key: Tensor
    query_bias: Tensor
    key_bias: Tensor

    @property
    def group(self) -> int:
        """Query heads that read one key head (grouped-query attention)."""
        return self.query.shape[0] // self.key.shape[0]

    def shared_keys(self) -> tuple[Tensor, Tensor]:
        return self.key.repeat_interleave(self.group, 0), self.key_bias.repeat_interleave(self.group, 0)


def fold_norm(
    query: Tensor,
    key: Tensor,
    norm: Norm,
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> HeadWeights:
    """Projections (H, D, width), (H_kv, D, width), their biases (H, D), (H_kv, D), and the norm before them.

    Raises ValueError for shapes that do not fit, or H that is no multiple of H_kv.
    """
    width = norm.gain.numel()
    if query.shape[1:] != key.shape[1:] or query.shape[2] != width or query.shape[0] % key.shape[0]:
        raise ValueError(
            f"expected query (H, D, {width}) and key (H_kv, D, {width}), H a multiple of H_kv, got "
            f"{tuple(query.shape)} and {tuple(key.shape)}"
        )
    gain, shift = norm.gain.double().cpu(), norm.bias.double().cpu()

    def side(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        weight = weight.double().cpu()
        constant = weight @ shift + (0.0 if bias is None else bias.double().cpu())
        folded = weight * gain
        if norm.centred:
            folded = folded - folded.mean(-1, keepdim=True)
        return folded, constant

    (a, a0), (b, b0) = side(query, query_bias), side(key, key_bias)
    return HeadWeights(a, b, a0, b0)


def weight_logit_bound(
    heads: HeadWeights,
    scale: float,
    *,
    rotary: int = 0,
    interleaved: bool | None = False,
    query_limit: float | None = None,
    key_limit: float | None = None,
    softcap: float | None = None,
    bias: Tensor | float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Largest |score| that any input can give, per query head, (H,) fp64, nats. Proved.

    Without positions in q and k:

        |s| <= scale (width |A^T B|_2 + sqrt(width) (|B^T a| + |A^T b|) + |a.b|)

    rotary: how many of D dimensions RoPE turns. Pairs are (i, i + rotary / 2), or (2i, 2i + 1) if `interleaved`;
    None means unknown pairs, and C = 1 below. A rotation keeps the lengths of pairs but turns A against B, so
    that only

        |s| <= scale (sqrt(width) |C A|_2 + |C a|) (sqrt(width) |C^-1 B|_2 + |C^-1 b|)

    holds, for any C that scales pairs. The smaller bound counts: C = 1, or the C that gives A and B equal
    norms on each pair. Dimensions that are not turned are taken as turned, which only loosens the bound.
    query_limit, key_limit: of |q| and |k| after QK-norm (`Norm.limit`): |s| <= scale query_limit key_limit.
    softcap: |s| <= softcap. bias: largest |bias| added to a score, (H,) or one for all, after the
    soft-cap.
    dtype: in which the model computes; its roundings may exceed the exact bound by `ROUNDING`'s share.
    Source: own derivation; norm inequalities. Grouped heads share their key head's weights.
    """
    a, a0 = heads.query, heads.query_bias
    b, b0 = heads.shared_keys()
    width = a.shape[2]
    if query_limit is not None or key_limit is not None:
        bound = _length(a, a0, query_limit) * _length(b, b0, key_limit)
    elif rotary and interleaved is not None:
        pairs = _pairs(a.shape[1], rotary, interleaved)
        shares = [_pair_norms(weight, constant, pairs) for weight, constant in ((a, a0), (b, b0))]
        c = (shares[1] / shares[0].clamp(min=1e-30)).clamp(1e-6, 1e6).sqrt()
        balanced = _length(a * c[..., None], a0 * c, None) * _length(b / c[..., None], b0 / c, None)
        bound = torch.minimum(balanced, _length(a, a0, None) * _length(b, b0, None))
    elif rotary:
        bound = _length(a, a0, None) * _length(b, b0, None)
    else:
        crossed = (b.transpose(1, 2) @ a0[..., None]).norm(dim=(1, 2))
        crossed = crossed + (a.transpose(1, 2) @ b0[..., None]).norm(dim=(1, 2))
        bound = width * _product_norm(a, b) + width**0.5 * crossed + (a0 * b0).sum(-1).abs()
    bound = bound * abs(scale) * (1.0 + ROUNDING.get(dtype, 2.0**-6))
    # Rounded products of inputs that cancel have errors in proportion to lengths, not to the score.
    lengths = abs(scale) * _length(a, a0, query_limit) * _length(b, b0, key_limit)
    bound = bound + lengths * (ROUNDING.get(dtype, 2.0**-6) / 4.0)
    if softcap is not None:
        bound = bound.clamp(max=softcap)
    return bound + bias


def weight_score_std(
    heads: HeadWeights, scale: float, *, rotary: int = 0, interleaved: bool | None = False
) -> Tensor:
    """Root mean square spread of a row's scores under isotropic inputs of unit variance, (H,) fp64, nats.

        sigma^2 = scale^2 (|A^T B|_F^2 + |B^T a|^2);    with RoPE  scale^2 sum over pairs |A_c|_F^2 |B_c|_F^2 / 2

    the latter over uniform angles and the dimensions that RoPE turns. An expectation: trained models'
    inputs have favourite directions.
    Source: own derivation.
    """
    a, a0 = heads.query, heads.query_bias
    b, _ = heads.shared_keys()
    still = slice(rotary, None)
    part, other = a[:, still], b[:, still]
    square = ((part @ part.transpose(1, 2)) * (other @ other.transpose(1, 2))).sum((1, 2))
    square = square + (other.transpose(1, 2) @ a0[:, still, None]).square().sum((1, 2))
    if rotary:
        pairs = _pairs(rotary, rotary, bool(interleaved))
        query = _pair_sums((a.square().sum(-1) + a0.square())[:, :rotary], pairs)
        square = square + (query * _pair_sums(b.square().sum(-1)[:, :rotary], pairs)).sum(-1) / 2.0
    return abs(scale) * square.sqrt()


def _length(weight: Tensor, constant: Tensor, limit: float | None) -> Tensor:
    """Largest |weight x + constant| over |x| <= sqrt(width), (H,)."""
    if limit is not None:
        return torch.full((weight.shape[0],), float(limit), dtype=torch.float64)
    return _spectral(weight @ weight.transpose(1, 2)).sqrt() * weight.shape[2] ** 0.5 + constant.norm(dim=-1)


def _product_norm(a: Tensor, b: Tensor) -> Tensor:
    """|A^T B|_2 from the D x D Gram matrices: the singular values of R_a R_b^T, A^T = Q_a R_a."""
    gram = b @ b.transpose(1, 2)
    # A^T (B B^T) A has the eigenvalues of L^T (B B^T) L, L L^T = A A^T, without width x width matrices.
    values, vectors = torch.linalg.eigh(a @ a.transpose(1, 2))
    root = vectors * values.clamp(min=0.0).sqrt()[:, None, :]
    return _spectral(root.transpose(1, 2) @ gram @ root).sqrt()


def _spectral(symmetric: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(symmetric)[..., -1].clamp(min=0.0)


def _pairs(head_dim: int, rotary: int, interleaved: bool) -> Tensor:
    """Index of the pair that each dimension belongs to, (D,); dimensions beyond `rotary` are pairs of one."""
    i = torch.arange(head_dim)
    turned = i // 2 if interleaved else i % (rotary // 2)
    return torch.where(i < rotary, turned, i)


def _pair_sums(square: Tensor, pairs: Tensor) -> Tensor:
    return torch.zeros_like(square).index_add_(1, pairs, square)


def _pair_norms(weight: Tensor, constant: Tensor, pairs: Tensor) -> Tensor:
    """Root mean square output of the pair that each dimension belongs to, (H, D)."""
    return _pair_sums(weight.square().sum(-1) + constant.square(), pairs)[:, pairs].sqrt()
