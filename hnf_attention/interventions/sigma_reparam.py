"""sigmaReparam on query and key weights: W becomes gamma / sigma(W) * W (Zhai et al., arXiv 2303.06296).

sigma(W) is the largest singular value. The largest score then follows the learned gamma, not the growth of W.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..compat import own_parameter
from ..names import display_name
from . import layout
from . import optimizers as optim
from .action import Action, Preview, Reading, Verdict

_FIRST_ITERATIONS = 50  # of the power method, from a random start; one more at each training forward


class SigmaReparam(nn.Module):
    """Parametrization of a weight (outputs, inputs). blocks: rows (start, stop) that have a gamma of their own."""

    left: Tensor  # singular vectors of the blocks, one after the other

    def __init__(self, weight: Tensor, blocks: list[tuple[int, int]]):
        super().__init__()
        self.blocks = blocks
        vectors = [torch.ones(stop - start, device=weight.device) for start, stop in blocks]
        self.register_buffer("left", torch.cat(vectors))
        with torch.no_grad():
            sigmas = [
                self._sigma(weight[slice(*block)], n, _FIRST_ITERATIONS) for n, block in enumerate(blocks)
            ]
        self.gamma = nn.Parameter(torch.stack(sigmas))

    def _sigma(self, rows: Tensor, number: int, iterations: int) -> Tensor:
        """The largest singular value of some rows, differentiable in them."""
        first = sum(stop - start for start, stop in self.blocks[:number])
        left = self.left[first : first + len(rows)]
        with torch.no_grad():
            wide = rows.detach().float()
            u = left.clone()
            for _ in range(iterations):
                u = nn.functional.normalize(wide @ (wide.T @ u), dim=0)
            if iterations:
                left.copy_(u)
            v = nn.functional.normalize(wide.T @ u, dim=0)
        return u @ rows.float() @ v

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer computes with."""
        parts, end = [], 0
        for number, (start, stop) in enumerate(self.blocks):
            rows = weight[start:stop]
            factor = self.gamma[number] / self._sigma(rows, number, int(self.training))
            parts += [weight[end:start], (rows * factor).to(weight.dtype)]
            end = stop
        return torch.cat([*parts, weight[end:]])


class StartSigmaReparam(Action):
    """Puts sigmaReparam on the query and key weights of layers; gamma starts at sigma, so the layer computes the same.

    intervention: 'layers': {layer: number of heads}. The gammas join the optimizer. The state dict then has the weight
    as `parametrizations.weight.original`. Such weights cannot be clipped: `QKClip` refuses the layer.

    Reverting gives the old weights bit for bit if nothing was learnt since, else those that the layer computes with.
    Raises ValueError for wrong items, and for layers whose queries and keys are not whole rows of linear projections.
    """

    name = "sigma_reparam"

    def __init__(
        self, model: nn.Module, optimizers: list[torch.optim.Optimizer], intervention: Mapping[str, Any]
    ):
        super().__init__()
        layers = intervention.get("layers")
        if not isinstance(layers, Mapping) or not layers:
            raise ValueError(f"expected 'layers' to map layer names to their number of heads, got {layers!r}")
        optim.vector_group(optimizers)
        self._optimizers, self._layers = optimizers, list(layers)
        self._places: list[tuple[nn.Module, list[tuple[int, int]]]] = []
        for layer, heads in layers.items():
            if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
                raise ValueError(f"expected the number of heads of layer {layer!r}, got {heads!r}")
            found = layout.find(model, layer, heads)
            if not found.whole:
                raise ValueError(
                    f"expected whole weights in layer {layer!r}, got some in parts (FSDP2, DTensors)"
                )
            self._places += self._holders(model, layer, [found.query[0], found.key[0]])

    @staticmethod
    def _holders(
        model: nn.Module, layer: str, views: list[Tensor]
    ) -> list[tuple[nn.Module, list[tuple[int, int]]]]:
        """The linear projections that hold these rows, and which rows."""
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        found: dict[nn.Module, list[tuple[int, int]]] = {}
        for view in views:
            for module in linear:
                weight = own_parameter(module, "weight")
                if weight is None or weight.untyped_storage().data_ptr() != view.untyped_storage().data_ptr():
                    continue
                if view.is_contiguous() and weight.is_contiguous():
                    start = (view.storage_offset() - weight.storage_offset()) // weight.shape[1]
                    found.setdefault(module, []).append((start, start + view.numel() // weight.shape[1]))
        if sum(map(len, found.values())) != len(views):
            raise ValueError(
                f"expected the queries and keys of layer {layer!r} to be whole blocks of rows of linear projections, "
                "got another order or another kind of projection"
            )
        return list(found.items())

    def preview(self) -> Preview:
        """As `Action.preview`."""
        names = ", ".join(map(display_name, self._layers))
        return Preview(f"sigmaReparam on query and key weights of {names}", {"layers": self._layers})

    def verify(self, reading: Reading) -> Verdict:
        """A reading does not show how a weight is made."""
        return Verdict(None, self.preview().text)

    def _do(self, undo: list[Callable[[], Any]]) -> str:
        for module, blocks in self._places:
            weight = module.get_parameter("weight")
            change = SigmaReparam(weight, sorted(blocks)).train(module.training)
            old = weight.detach().to("cpu", copy=True), change.gamma.detach().clone()
            parametrize.register_parametrization(module, "weight", change, unsafe=True)
            undo.append(partial(self._take_back, module, change, *old))
            optim.vector_group(self._optimizers)["params"].append(change.gamma)
        return self.preview().text

    def _take_back(self, module: nn.Module, change: SigmaReparam, weight: Tensor, gamma: Tensor) -> None:
        optim.leave(self._optimizers, [change.gamma])
        now = module.get_parameter("parametrizations.weight.original")
        learnt = not (torch.equal(now.cpu(), weight) and torch.equal(change.gamma, gamma))
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=learnt)
        for name, parameter in list(module.named_parameters(recurse=False)):
            if name != "weight":  # the weight came first, and comes first again
                delattr(module, name)
                module.register_parameter(name, parameter)
