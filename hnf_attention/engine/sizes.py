"""How large the scores of each head are: a bound that costs little, and the exact rows of the heads that need them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.options import Options
from . import api, engines


def longest_rows(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """The length of the longest query (H,) and of the longest key (H_kv,) of each head, fp32.

    query (B, H, M, D), key (B, H_kv, N, D), at least one row each. A head with NaN or inf gets inf or NaN.
    """
    if engines.kernels_cover(query, None):
        with engines.on_device(query):
            return engines.kernel("measure.longest").longest_rows(query, key)
    return _longest(query), _longest(key)


def _longest(x: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=-1, dtype=dtype).amax((0, 2)).float()


def extreme_scores(
    query: Tensor, key: Tensor, options: Options, wanted: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The largest and the smallest score of each row, (B, H, M) fp32, of the heads that are wanted.

    wanted: boolean (H,), on the device, None for all heads. The rows of other heads may hold anything. Tensors as for
        `longest_rows`.
    """
    if engines.kernels_cover(query, None) and key.shape[2] > 0:
        with engines.on_device(query):
            rows = engines.kernel("portable.probe").probe(query, key, options, wanted=wanted)
        return rows[2], rows[3]
    found = api.attend(query, key, None, options, detached=True)[1]
    return found.max_logit, found.min_logit
