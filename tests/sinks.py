"""The weight on a row's sink key, from a model's own attention weights."""

import torch

ASKED = 32  # rows of a head that say which key they share
LEAST = 8  # fewer share none


def sink_mass(weights, seen=None):
    """(B, H, M) fp64: weight on the first visible key or on the key that the rows share, whichever is larger.

    weights (B, H, M, N). seen: boolean, broadcastable to them, which keys are visible; by default those with weight.
    """
    weights = weights.double()
    seen = (weights > 0 if seen is None else seen).expand(weights.shape)
    first = weights.gather(3, seen.to(torch.uint8).argmax(3, keepdim=True))[..., 0]
    shared = torch.zeros_like(first)
    for batch, of_batch in enumerate(weights):
        rows = torch.arange(weights.shape[2])
        if weights.shape[2] == weights.shape[3]:  # queries whose own key nobody sees are padding
            rows = rows[seen[batch].any(0).any(0)]
        if len(rows) >= LEAST:
            asked = rows[((torch.arange(ASKED) + 0.5) * len(rows) / ASKED).long()]
            for head, of_head in enumerate(of_batch):
                shared[batch, head] = of_head[:, of_head[asked].sum(0).argmax()]
    return torch.where(seen.any(3), torch.maximum(first, shared), 0.0)
