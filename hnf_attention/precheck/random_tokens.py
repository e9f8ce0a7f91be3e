"""What a checkpoint's scores come to on random tokens: no data, but all its layers and its own arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..engine import api
from ..instrumentation import Measurement
from .measured import run_measured

SEQUENCES, LENGTH = 8, 128
_SEED = 0


def random_token_maxima(model: nn.Module, seq_len: int) -> dict[str, Tensor]:
    """Layer -> E max_ij |s_ij| of each query head on random tokens, (H,) fp64, nats.

    The mean over SEQUENCES sequences of the largest score that each has. Tokens are independent and uniform over
    the rows of the embedding table, min(seq_len, LENGTH) a sequence, the same at every call. NaN where scores are.

    An estimate with no guarantee, from the checkpoint alone: `theory.weight_logit_bound` holds for every input of
    a norm layer, wherever it points; what reaches a layer lies in few directions, which weights of that layer do
    not tell and a run through the layers before it does. It ranks heads as text does (bench/weight_bounds.py)
    where texts are about as long. Evaluation mode, no gradients, no randomness but its own.

    Raises ValueError for a model without a table of token embeddings, that cannot run on token ids alone, or none
    of whose attention can be measured.
    """
    table = _embedding(model)
    generator = torch.Generator().manual_seed(_SEED)
    shape = SEQUENCES, max(1, min(seq_len, LENGTH))
    ids = torch.randint(table.num_embeddings, shape, generator=generator).to(table.weight.device)
    sample: Any = ids
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) is True:
        sample = {"input_ids": ids, "decoder_input_ids": ids}
    found: dict[str, Tensor] = {}

    def read(measurement: Measurement) -> None:
        rows = api.attend(measurement.query, measurement.key, None, measurement.options)[1].detach()
        largest = torch.maximum(rows.max_logit.abs(), rows.min_logit.abs()).double().cpu()
        largest = torch.where(rows.lse.cpu() == -torch.inf, 0.0, largest).amax(2).mean(0)
        before = found.get(measurement.layer)
        found[measurement.layer] = largest if before is None else torch.maximum(before, largest)

    run_measured(model, sample, read)
    return found


def _embedding(model: nn.Module) -> nn.Embedding:
    """The table that token ids are looked up in: the one the model names, else the largest that is not of positions."""
    named = getattr(model, "get_input_embeddings", None)
    try:
        table = named() if callable(named) else None
    except (NotImplementedError, AttributeError):
        table = None
    if isinstance(table, nn.Embedding):
        return table
    tables = [
        m for name, m in model.named_modules() if isinstance(m, nn.Embedding) and "pos" not in name.lower()
    ]
    if not tables:
        raise ValueError(f"expected a table of token embeddings, got {type(model).__name__} without one")
    return max(tables, key=lambda table: table.num_embeddings)
