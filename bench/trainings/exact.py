"""Row statistics in fp64 from the queries and keys that a layer had, under masks made from the configuration.

Nothing of hnf_attention takes part: `spied` keeps what the model hands to its attention function, and `rows` computes
all scores of one head at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

FIELDS = ("lse", "entropy", "max_logit", "min_logit")
JUDGED = 16  # rows with fewer visible keys have no share in a normalised entropy


class Seen(NamedTuple):
    """What a layer's attention was given: query (B, H, N, D), key (B, H_kv, N, D), and its sinks (H,) or None."""

    query: Tensor
    key: Tensor
    scale: float
    sinks: Tensor | None


@contextmanager
def spied(layers: set[int]) -> Iterator[dict[int, Seen]]:
    """While it is open, what these layers of any model of transformers hand to their attention, by number."""
    found: dict[int, Seen] = {}
    chosen = ALL_ATTENTION_FUNCTIONS.get_interface

    def get_interface(name: str, default: Any) -> Any:
        function = chosen(name, default)

        @functools.wraps(function)
        def call(module: Any, query: Tensor, key: Tensor, *rest: Any, scaling: float, **keywords: Any) -> Any:
            if module.layer_idx in layers:
                sinks = getattr(module, "sinks", None)
                found[module.layer_idx] = Seen(
                    query.detach(), key.detach(), scaling, None if sinks is None else sinks.detach()
                )
            return function(module, query, key, *rest, scaling=scaling, **keywords)

        return call

    ALL_ATTENTION_FUNCTIONS.get_interface = get_interface
    try:
        yield found
    finally:
        del ALL_ATTENTION_FUNCTIONS.get_interface


def visible(positions: Tensor, window: int | None) -> Tensor:
    """Boolean (B, N, N), which keys each query sees. positions: (B, N), from 0 in each sequence of a pack."""
    sequence = (positions == 0).cumsum(1)
    place = torch.arange(positions.shape[1], device=positions.device)
    behind = place[:, None] - place
    seen = (behind >= 0) & (sequence[:, :, None] == sequence[:, None])
    return seen if window is None else seen & (behind < window)


def rows(seen: Seen, positions: Tensor, window: int | None) -> dict[str, Tensor]:
    """FIELDS, (B, H, N) each, fp64; and `keys` (B, N), how many keys each query sees."""
    query, key = seen.query.double(), seen.key.double()
    shows = visible(positions, window)
    heads, group = query.shape[1], query.shape[1] // key.shape[1]
    found = {name: torch.empty(query.shape[:3], dtype=torch.float64, device=query.device) for name in FIELDS}
    for batch in range(query.shape[0]):
        hidden = ~shows[batch]
        for head in range(heads):
            scores = seen.scale * query[batch, head] @ key[batch, head // group].T
            found["min_logit"][batch, head] = scores.masked_fill(hidden, torch.inf).amin(-1)
            scores = scores.masked_fill(hidden, -torch.inf)
            found["max_logit"][batch, head] = scores.amax(-1)
            if seen.sinks is not None:
                sink = seen.sinks[head].double().expand(scores.shape[0], 1)
                scores = torch.cat([scores, sink], 1)
            logs = scores.log_softmax(-1)
            found["entropy"][batch, head] = -(logs.exp() * logs.masked_fill(logs.isinf(), 0.0)).sum(-1)
            found["lse"][batch, head] = scores.logsumexp(-1)
    return found | {"keys": shows.sum(-1)}


def of_heads(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a monitor reports of a layer, (H,) each, from its rows."""
    keys = found["keys"][:, None].expand_as(found["entropy"])
    judged = keys >= JUDGED
    ratio = torch.where(judged, found["entropy"] / keys.clamp(min=2).double().log(), 0.0)
    return {
        "entropy": found["entropy"].mean((0, 2)),
        "normalized_entropy": ratio.sum((0, 2)) / judged.sum((0, 2)),
        "max_logit": found["max_logit"].amax((0, 2)),
        "min_logit": found["min_logit"].amin((0, 2)),
        "logit_range_max": (found["max_logit"] - found["min_logit"]).amax((0, 2)),
    }


def difference(ours: Tensor, exact: Tensor) -> float:
    """The largest difference, in units of the exact number where that is above 1."""
    exact = exact.double()
    return ((ours.to(exact) - exact).abs() / exact.abs().clamp(min=1)).max().item()
