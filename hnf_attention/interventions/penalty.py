"""Terms for the loss, from the entropy and the log-sum-exp of attention rows, which are differentiable."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import api
from ..instrumentation.interceptors import sdpa
from ..instrumentation.treated import Treated
from ..names import unwrapped
from ..reference import masks
from ..reference.options import Options
from .intervention import check_positive
from .on_calls import layers_of


class AttentionPenalty:
    """Adds attention's z-loss, or a reward for entropy, to a loss.

        penalty = AttentionPenalty(model, layers=["blocks.0.attn"], z_loss=1e-4)
        loss = task_loss(model(batch)) + penalty.loss()

    z_loss: weight of the mean of lse ** 2 over rows, nats squared: it holds down the scores, as PaLM's does for output
        logits (arXiv 2204.02311, section 5).
    entropy: weight of the mean over rows of log(visible keys) - entropy, nats: it holds heads open (arXiv 2303.06296
        shows what their collapse costs). One of the two must be given.
    layers: names of the modules that call scaled_dot_product_attention themselves. Each is weighed alike.

    Only training forwards count (`module.training`, with grad). The rows are computed once more beside the model's own
    attention. A row without a visible key counts nothing. `remove()` ends it.

    Raises ValueError or TypeError for wrong arguments.
    """

    name, sdpa_only, optional, dropout = "a penalty on attention", True, False, True

    def __init__(
        self,
        model: nn.Module,
        layers: Collection[str],
        *,
        z_loss: float | None = None,
        entropy: float | None = None,
    ):
        if z_loss is None and entropy is None:
            raise ValueError("expected z_loss or entropy to be a weight > 0, got None for both")
        self._z_loss = None if z_loss is None else check_positive("z_loss", z_loss)
        self._entropy = None if entropy is None else check_positive("entropy", entropy)
        self._penalised = layers_of(unwrapped(model), {"layers": list(layers)})
        self._terms: list[Tensor] = []
        self._removed = False
        for module in self._penalised.values():
            Treated.add(module, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> AttentionPenalty:
        return self  # a copy of the model adds its terms here too, if it is trained

    def run(
        self,
        module: nn.Module,
        attend: Callable[..., Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *rest: Any,
        **named: Any,
    ) -> Any:
        """As `Change.run`."""
        if module.training and torch.is_grad_enabled():
            call = sdpa.call_of(None, query, key, value, *rest, **named)
            call.cast()
            options = call.validated()
            rows = api.attend(call.query, call.key, None, options)[1]
            self._terms.append(self._term(rows.lse, rows.entropy, call.query, call.key.shape[2], options))
        return attend(query, key, value, *rest, **named)

    def _term(self, lse: Tensor, entropy: Tensor, query: Tensor, num_keys: int, options: Options) -> Tensor:
        seen = lse > -torch.inf
        count = seen.sum().clamp(min=1)
        term = lse.new_zeros(())
        if self._z_loss is not None:
            term = term + self._z_loss * torch.where(seen, lse, 0.0).square().sum() / count
        if self._entropy is not None:
            visible = masks.visible_keys(query.shape[2], num_keys, options, query.device)[0]
            most = visible.clamp(min=1).log().to(entropy.dtype)
            term = term + self._entropy * torch.where(seen, most - entropy, 0.0).sum() / count
        return term

    def loss(self) -> Tensor:
        """The terms of all training forwards since the last call: a number to add to the loss.

        Raises RuntimeError if there was none.
        """
        if not self._terms:
            raise RuntimeError("expected a training forward of the model before loss(), got none")
        terms, self._terms = self._terms, []
        return torch.stack([term.to(terms[0].device) for term in terms]).mean()

    def remove(self) -> None:
        """End it. A second call does nothing."""
        if not self._removed:
            for module in self._penalised.values():
                Treated.remove(module, self)
        self._removed = True
