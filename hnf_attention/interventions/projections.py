"""A layer's query and key weights, read from parameters that are proved to be its own plain linear weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..compat import own_parameter
from .shards import Shards


@dataclass(frozen=True)
class Projections:
    """A layer's query and key weights and biases, as views into the parameters.

    query: tensors whose first dimension is the H query heads. key: the same for the H_kv key heads.
    Scaling both, or the query side alone, scales every score before bias and soft-cap.
    shards: where FSDP2 keeps the weights in parts, the factors that stand for their rows here; else None.
    """

    query: list[Tensor]
    key: list[Tensor]
    num_heads: int
    num_key_heads: int
    shards: Shards | None = None

    @classmethod
    def by_head(
        cls, query: list[Tensor], key: list[Tensor], num_heads: int, num_key_heads: int
    ) -> Projections:
        """From rows ordered by heads: (heads * D, ...) each."""
        return cls(
            [rows.unflatten(0, (num_heads, -1)) for rows in query],
            [rows.unflatten(0, (num_key_heads, -1)) for rows in key],
            num_heads,
            num_key_heads,
        )

    @property
    def keys_shared(self) -> bool:
        """Whether several query heads read one key head (grouped-query attention)."""
        return self.num_key_heads != self.num_heads


def linear_rows(module: nn.Module, layer: str, name: str, shards: Shards | None) -> list[Tensor]:
    """Weight (outputs, inputs) and, where there is one, bias (outputs,) of a plain linear projection.

    Where they are sharded, factors for them: (outputs, 1) and (outputs,).
    Raises ValueError for anything but a linear layer with floating-point weights of its own.
    """
    projection = getattr(module, name)
    weight = own_parameter(projection, "weight")
    conv1d = type(projection).__name__ == "Conv1D"  # transformers' own: weight (inputs, outputs)
    plain = isinstance(projection, nn.Linear) or conv1d
    if not plain or weight is None or not weight.is_floating_point() or weight.dim() != 2:
        raise _not_its_own(f"{layer}.{name}", projection)
    rows = parameter_rows(weight, f"{layer}.{name}", shards, dim=1 if conv1d else 0)
    rows = rows.t() if conv1d else rows
    if projection.bias is None:
        return [rows]
    return [rows, parameter_rows(projection.bias, f"{layer}.{name}", shards)]


def parameter_rows(parameter: Tensor, name: str, shards: Shards | None, dim: int = 0) -> Tensor:
    """The parameter itself or, where it is sharded, factors for it along `dim`."""
    if shards is not None:
        return shards.rows(parameter, dim)
    if type(parameter.data) is not Tensor:
        raise _not_its_own(name, parameter.data)
    return parameter.detach()


def _not_its_own(name: str, found: object) -> ValueError:
    return ValueError(
        f"expected {name} to be a linear layer with its own floating-point weight, got "
        f"{type(found).__module__}.{type(found).__name__} "
        "(merge adapters, gather shards, remove parametrizations first)"
    )
