"""A layer's query and key weights, read from parameters that are proved to be its own plain linear weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .. import compat
from .shards import HeadPart, Shards, Spread, own_class, own_part

#: Forwards of transformers that multiply the input by the weight, add the bias, and do nothing else.
KNOWN_FORWARDS = (
    "transformers.pytorch_utils.Conv1D.forward",
    "transformers.models.falcon.modeling_falcon.FalconLinear.forward",
)


@dataclass(frozen=True)
class Projections:
    """A layer's query and key weights and biases, as views into the parameters.

    query: tensors whose first dimension is the H query heads, or whose first two are key heads and the query heads of
        each. key: tensors whose first dimension is the H_kv key heads.
    Scaling both, or the query side alone, scales every score before bias and soft-cap.
    parameters: those that the views lie in.
    shards: where FSDP2 keeps the weights in parts, the factors that stand for their rows here; else None.
    part: of the layer's heads, those that tensor parallelism gave this process. All others here are these heads.
    rest: query weights whose keys all heads share, as the rotary part of latent attention: they take both factors.
    width: of the module's input, where it is not that of the projections.
    """

    query: list[Tensor]
    key: list[Tensor]
    num_heads: int
    num_key_heads: int
    parameters: list[Tensor]
    shards: Shards | None = None
    rest: list[Tensor] = field(default_factory=list)
    width: int | None = None
    part: HeadPart = HeadPart()

    @property
    def whole(self) -> bool:
        """Whether this process holds all of the weights."""
        return self.shards is None and self.part.count == 1

    @property
    def keys_shared(self) -> bool:
        """Whether several query heads read one key head (grouped-query attention)."""
        return self.num_key_heads != self.num_heads

    @property
    def query_by_head(self) -> list[Tensor]:
        """The query weights with all heads in the first dimension: copies where `query` has two for them."""
        return [x if x.shape[0] == self.num_heads else x.flatten(0, 1) for x in self.query]

    @torch.no_grad()
    def multiply(self, query: Tensor, key: Tensor | None) -> None:
        """Multiply each head's query weights by `query` (H,) and its key weights by `key` (H_kv,), in place."""
        both = query if key is None or not self.rest else query * key
        for tensors, factors in ((self.query, query), (self.key, key), (self.rest, both)):
            if factors is None:
                continue
            for tensor in tensors:
                # In at least fp32: a bf16 factor would be off by half a percent.
                wide = torch.promote_types(tensor.dtype, torch.float32)
                heads = tensor.shape[:1] if tensor.shape[0] == len(factors) else tensor.shape[:2]
                shape = *heads, *(1,) * (tensor.dim() - len(heads))
                tensor.mul_(factors.to(tensor.device, wide).view(shape))
        if self.shards is not None:
            self.shards.multiply()


@dataclass
class Reader:
    """Reads one layer's weights, as values or, where FSDP2 keeps them in shards, as factors that stand for them.

    spread: how they lie over processes; None reads whole weights alone.
    changing: the weights are to be changed. A weight that cannot be changed for good is then refused.
    parameters: what was read so far.
    """

    layer: str
    spread: Spread | None = None
    changing: bool = False
    parameters: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._shards = Shards() if self.spread is not None and self.spread.fsdp else None

    def linear(self, module: nn.Module, name: str) -> list[Tensor]:
        """Weight (outputs, inputs) and, where there is one, bias (outputs,) of a plain linear projection.

        Where they are sharded, factors for them: (outputs, 1) and (outputs,).
        Raises ValueError for anything but a linear layer with floating-point weights of its own.
        """
        projection, where = getattr(module, name), f"{self.layer}.{name}"
        weight = compat.own_parameter(projection, "weight")
        conv1d = type(projection).__name__ == "Conv1D"  # transformers' own: weight (inputs, outputs)
        if not (isinstance(projection, nn.Linear) or conv1d) or weight is None or weight.dim() != 2:
            raise _not_its_own(where, projection)
        rows = self.rows(weight, name, dim=1 if conv1d else 0)
        read = [rows.t() if conv1d else rows]
        if projection.bias is not None:
            read.append(self.rows(projection.bias, name))
        if self.changing and not _computes_plainly(projection):
            raise ValueError(
                f"expected {where} to compute its weight times its input and nothing else, got "
                f"{type(projection).__module__}.{type(projection).__name__} with a forward or hooks of its own"
            )
        return read

    def rows(self, parameter: Tensor, name: str, dim: int = 0) -> Tensor:
        """The parameter itself or, where it is sharded, factors for it along `dim`.

        name: of the parameter's holder in the layer.
        """
        where = f"{self.layer}.{name}"
        if parameter.is_meta:  # said first: what offloads weights also replaces the forwards of their modules
            raise ValueError(
                f"expected layer {self.layer!r} to hold its query and key weights, got those of {name!r} on the "
                "meta device (an offloaded model keeps them elsewhere and brings them here for a forward only)"
            )
        if self.changing:
            _check_changeable(parameter, where)
        values = parameter.detach()
        if type(values if self.spread is None else own_part(values)) is not Tensor:
            raise _not_its_own(where, parameter.data)
        self.parameters.append(parameter)
        return values if self.spread is None else self.spread.rows(parameter, dim, self._shards)

    def by_head(
        self, query: Sequence[Tensor], key: Sequence[Tensor], num_heads: int, num_key_heads: int
    ) -> Projections:
        """What was read, from rows ordered by heads: (heads * D, ...) each."""
        return self.projections(
            [rows.unflatten(0, (num_heads, -1)) for rows in query],
            [rows.unflatten(0, (num_key_heads, -1)) for rows in key],
        )

    def projections(
        self,
        query: list[Tensor],
        key: list[Tensor],
        num_heads: int | None = None,
        rest: Sequence[Tensor] = (),
        width: int | None = None,
    ) -> Projections:
        """What was read, from tensors whose first dimension is the heads. num_heads: where two dimensions are."""
        heads = len(query[0]) if num_heads is None else num_heads
        part = HeadPart() if self.spread is None else self.spread.part
        return Projections(
            query, key, heads, len(key[0]), self.parameters, self._shards, list(rest), width, part
        )


def _computes_plainly(projection: nn.Module) -> bool:
    """Whether the forward is that of nn.Linear or one of KNOWN_FORWARDS, and no hook may change what it returns.

    Tensor parallelism puts hooks or a forward around it, which move numbers between processes.
    """
    cls = type(projection)
    linear = cls.forward is nn.Linear.forward
    written = f"{cls.forward.__module__}.{cls.forward.__qualname__}"
    known = written in KNOWN_FORWARDS
    hooked = own_class(projection) is cls and not all(  # FSDP2's hooks gather weights
        compat.splits_module(hook) for hook in compat.forward_hooks(projection)
    )
    replaced = vars(projection).get("forward")
    return (linear or known) and not hooked and (replaced is None or compat.splits_layer(replaced))


def _check_changeable(parameter: Tensor, where: str) -> None:
    """Raise ValueError for a parameter that is frozen, or whose values cannot be multiplied in place."""
    if not parameter.is_floating_point() or parameter.element_size() < 2:
        raise ValueError(
            f"expected floating-point weights of 16 bits or more in {where}, got {parameter.dtype}"
        )
    if not parameter.requires_grad:
        raise ValueError(
            f"expected trainable weights in {where}, got frozen ones: training keeps them as they are, "
            "and an adapter or checkpoint of what was trained would not carry the change"
        )
    if parameter.is_inference():
        raise ValueError(f"expected weights that may change in {where}, got a tensor of inference mode")


def _not_its_own(name: str, found: object) -> ValueError:
    return ValueError(
        f"expected {name} to be a linear layer with its own floating-point weight, got "
        f"{type(found).__module__}.{type(found).__name__} "
        "(merge adapters, gather shards, remove parametrizations first)"
    )
