"""The largest scores of a checkpoint on random tokens: an estimate that takes no data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..instrumentation import Measurement
from .measured import run_measured

SEQUENCES, LENGTH = 8, 128
_SEED = 0


def random_token_maxima(model: nn.Module, seq_len: int) -> dict[str, Tensor]:
    """Layer -> E max_ij |s_ij| of each query head on random tokens, (H,) fp64, nats.

    The mean over SEQUENCES sequences of the largest |score| in each. A sequence has min(seq_len, LENGTH) tokens,
    independent and uniform over the rows of the embedding table, and the same at every call. A head whose scores
    are NaN gives NaN. The model runs in evaluation mode, without gradients and with a random generator of its own.

    The estimate has no guarantee: `theory.weight_logit_bound` holds for every input of the norm layer, while real
    inputs point in few directions, which only a run through the earlier layers shows. It ranks heads as real text
    does (bench/weight_bounds.py), if the text is about as long.

    Raises ValueError for a model without a table of token embeddings, a model that cannot run on token ids alone,
    and a model none of whose attention can be measured.
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
        rows = measurement.rows
        largest = torch.maximum(rows.max_logit.abs(), rows.min_logit.abs()).double().cpu()
        largest = torch.where(rows.max_logit.cpu() == -torch.inf, 0.0, largest).amax(2).mean(0)
        before = found.get(measurement.layer)
        found[measurement.layer] = largest if before is None else torch.maximum(before, largest)

    run_measured(model, sample, read)
    return found


def _embedding(model: nn.Module) -> nn.Embedding:
    """The table of token embeddings: the one the model names, else the largest that is not for positions."""
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
