"""AdamW and Muon for all members of an ensemble at once, each with its own rate, and torch's own for one model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .ensemble import Ensemble
from .recipes import Recipe

BETA1, EPSILON, MOMENTUM = 0.9, 1e-8, 0.95
#: Newton-Schulz coefficients of torch.optim.Muon.
_COEFFICIENTS, _ITERATIONS = (3.4445, -4.7750, 2.0315), 5


def is_hidden(name: str) -> bool:
    """Whether a parameter is a matrix of a block: what Muon takes."""
    return name.startswith("blocks.") and "_proj." in name


def decays(name: str) -> bool:
    """Whether weight decay acts on a parameter: on matrices."""
    return is_hidden(name) or name in ("bytes.weight", "positions.weight", "head.weight")


def optimizers_of(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Torch's own optimizers for the model of one recipe; their rates are set at each step."""
    named = dict(model.named_parameters())
    muon = {name for name in named if recipe.optimizer == "muon" and is_hidden(name)}
    groups = [
        {"params": [p for name, p in named.items() if name not in muon and decays(name) == decayed]}
        | {"weight_decay": recipe.weight_decay if decayed else 0.0}
        for decayed in (True, False)
    ]
    fused = next(model.parameters()).is_cuda
    rest = torch.optim.AdamW(groups, lr=recipe.rate, betas=(BETA1, recipe.beta2), eps=EPSILON, fused=fused)
    if not muon:
        return [rest]
    matrices = torch.optim.Muon(
        [named[name] for name in muon],
        lr=recipe.rate,
        weight_decay=recipe.weight_decay,
        momentum=MOMENTUM,
        adjust_lr_fn="match_rms_adamw",
    )
    return [matrices, rest]


class Together:
    """The same updates for every member, on the flat weights (E, P)."""

    def __init__(self, ensemble: Ensemble, recipes: Sequence[Recipe]) -> None:
        self._ensemble = ensemble
        device = ensemble.flat.device

        def column(name: str) -> Tensor:
            return torch.tensor(
                [[getattr(each, name)] for each in recipes], device=device, dtype=torch.float32
            )

        self._beta2, self._clip, self._decay = column("beta2"), column("clip"), column("weight_decay")
        self._matrix = torch.zeros(1, ensemble.flat.shape[1], device=device)
        for name, columns in ensemble.columns.items():
            self._matrix[:, columns] = float(decays(name))
        muon = recipes[0].optimizer == "muon"
        self._muon = [name for name in ensemble.columns if muon and is_hidden(name)]
        self._first, self._second = torch.zeros_like(ensemble.flat), torch.zeros_like(ensemble.flat)
        self._steps = torch.zeros(len(recipes), 1, device=device)
        self._momentum = {name: torch.zeros_like(self._part(ensemble.flat, name)) for name in self._muon}
        self._scaler = _Scaler(len(recipes), device) if recipes[0].precision == "float16 scaled" else None

    def scaled(self, losses: Tensor) -> Tensor:
        """What to call `backward` on, of the members' losses (E,)."""
        return (losses if self._scaler is None else losses * self._scaler.scale).sum()

    @torch.no_grad()
    def step(self, grad: Tensor, rates: Tensor) -> Tensor:
        """Update all members by gradients (E, P), which are overwritten, and rates (E,).

        Returns the norms of the gradients before clipping, (E,).
        """
        weights, rates = self._ensemble.flat, rates[:, None]
        taken = torch.ones_like(self._steps)
        if self._scaler is not None:
            grad /= self._scaler.scale[:, None]
            # Members with a gradient that is not finite skip the step.
            taken = self._scaler.finite(grad)[:, None].float()
        norms = grad.norm(dim=1, keepdim=True)
        grad *= torch.where(self._clip > 0, (self._clip / (norms + 1e-6)).clamp(max=1.0), 1.0)
        if self._scaler is not None:
            torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0, out=grad)
        rates = rates * taken
        self._steps += taken
        self._first.lerp_(grad, (1.0 - BETA1) * taken)
        self._second.lerp_(grad.square(), (1.0 - self._beta2) * taken)
        correction = 1.0 - self._beta2**self._steps
        denominator = (self._second / correction).sqrt_().add_(EPSILON)
        update = (self._first / denominator).mul_(rates / (1.0 - BETA1**self._steps))
        for name in self._muon:
            self._part(update, name).copy_(self._orthogonal(name, grad, taken) * rates)
        weights.mul_(1.0 - rates * self._decay * self._matrix)
        weights.sub_(update if self._scaler is None else torch.where(taken > 0, update, 0.0))
        return norms[:, 0]

    def _part(self, flat: Tensor, name: str) -> Tensor:
        return flat[:, self._ensemble.columns[name]]

    def _orthogonal(self, name: str, grad: Tensor, taken: Tensor) -> Tensor:
        """The update of Muon for one matrix of each member, (E, size)."""
        shape, part, momentum = self._ensemble.shapes[name], self._part(grad, name), self._momentum[name]
        momentum.lerp_(part, (1.0 - MOMENTUM) * taken)
        x = part.lerp(momentum, MOMENTUM).view(-1, *shape).bfloat16()
        wide = x if shape[0] <= shape[1] else x.mT
        wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
        a, b, c = _COEFFICIENTS
        for _ in range(_ITERATIONS):
            gram = wide @ wide.mT
            wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
        found = wide if shape[0] <= shape[1] else wide.mT
        return found.float().reshape(len(part), -1) * (0.2 * max(shape) ** 0.5)


class _Scaler:
    """Loss scaling for each member, by the rule of torch.amp.GradScaler."""

    def __init__(self, members: int, device: torch.device) -> None:
        self.scale = torch.full((members,), 2.0**16, device=device)
        self._good = torch.zeros(members, device=device)

    def finite(self, grad: Tensor) -> Tensor:
        """Which members' gradients are finite, bool (E,); the scales follow."""
        found = grad.isfinite().all(1)
        self._good = torch.where(found, self._good + 1, 0.0)
        grown = self._good >= 200
        self.scale = torch.where(found, self.scale, self.scale / 2).clamp(min=1.0)
        self.scale = torch.where(grown, self.scale * 2, self.scale)
        self._good = torch.where(grown, 0.0, self._good)
        return found
