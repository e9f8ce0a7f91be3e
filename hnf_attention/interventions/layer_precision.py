"""The attention of single layers in higher precision: a format that overflows or rounds too much is left there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..names import display_name
from .action import Preview, Reading, Verdict
from .on_calls import OnCalls, layers_of


class _InPrecision:
    """The change of one module's call."""

    name, sdpa_only, optional, dropout = "higher precision", True, False, True

    def run(
        self,
        module: nn.Module,
        attend: Callable[..., Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *rest: Any,
        **named: Any,
    ) -> Tensor:
        """As `Change.run`: products, softmax and sums are fp32. The output has the value's dtype again."""
        dtype = value.dtype
        if torch.is_autocast_enabled(query.device.type):
            dtype = torch.get_autocast_dtype(query.device.type)
        mask = named.get("attn_mask", rest[0] if rest else None)
        if isinstance(mask, Tensor) and mask.is_floating_point():
            if "attn_mask" in named:
                named["attn_mask"] = mask.float()
            else:
                rest = (mask.float(), *rest[1:])
        with torch.autocast(query.device.type, enabled=False):
            return attend(query.float(), key.float(), value.float(), *rest, **named).to(dtype)


class LayerPrecision(OnCalls):
    """Computes the attention of layers in fp32; their projections stay in the model's format.

    intervention: 'layers' (a list of names). It helps against a product or a sum that overflows in fp16, and against
    the rounding of repeated maxima in bf16 (arXiv 2510.04212). Queries that are inf already stay inf. Raises ValueError
    for wrong items.
    """

    name = "precision"

    def __init__(self, model: nn.Module, intervention: Mapping[str, Any]):
        self._names = layers_of(model, intervention)
        super().__init__(model, {name: _InPrecision() for name in self._names})

    def preview(self) -> Preview:
        """As `Action.preview`."""
        names = list(self._names)
        return Preview(f"attention of {', '.join(map(display_name, names))} in fp32", {"layers": names})

    def verify(self, reading: Reading) -> Verdict:
        """Whether the layers were measured in fp32."""
        found = {name: str(reading[name].dtype) for name in self._names if name in reading}
        if len(found) < len(self._names):
            return Verdict(None, "not every layer was measured")
        holds = all("float32" in dtype for dtype in found.values())
        return Verdict(holds, f"measured in {', '.join(sorted(set(found.values())))}")
