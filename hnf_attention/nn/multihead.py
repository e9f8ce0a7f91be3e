"""A drop-in for `torch.nn.MultiheadAttention` that keeps the statistics of what it computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import api
from ..instrumentation import observer
from ..instrumentation.call import AttentionCall, Unmeasurable
from ..instrumentation.interceptors import multihead, sdpa
from ..statistics.rows import RowStats
from ..tracing import transformed


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention`: same constructor, arguments, results and state dict, both ways.

    row_stats: `RowStats` (B, H, L) of the last forward, outside autograd; B is 1 for unbatched input. They
        are of the softmax before dropout, over the keys that add_bias_kv and add_zero_attn append as well.
        None before the first forward, under torch.compile, for tensors without numbers, and inside an
        instrumented model, whose instrumentation measures then, and only when it wants to. In inference
        nn.TransformerEncoderLayer may pass this module by, which leaves what was there.

    Without need_weights and dropout the output comes from the same pass as the statistics; otherwise
    PyTorch computes the output and the statistics are taken beside it. Its inference fast path is not used.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.row_stats: RowStats | None = None

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As `torch.nn.MultiheadAttention.forward`."""
        self.row_stats = None
        if transformed() or observer.owner(self) is not None:
            return super().forward(*args, **kwargs)
        patches = [*sdpa.install(), *multihead.install()]
        try:
            with multihead.receiving(self._attend, self._probe):
                return super().forward(*args, **kwargs)
        finally:
            for patch in patches:
                patch.release()

    def _attend(self, original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        try:
            call = sdpa.call_of(None, *args, **kwargs)
        except Unmeasurable:
            return original(*args, **kwargs)
        if call.not_fused is not None:
            self._probe(call)
            return original(*args, **kwargs)
        call.cast()
        out: Any  # there is one, as the call has a value
        out, self.row_stats = api.attend(call.query, call.key, call.value, call.validated(), detached=True)
        return call.from_output(out)

    @torch.no_grad()
    def _probe(self, call: AttentionCall) -> None:
        call.cast()
        self.row_stats = api.attend(call.query, call.key, None, call.validated())[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"row_stats": None}
