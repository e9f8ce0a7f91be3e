"""Head statistics of several processes as one: for each group an exchange of names and two collectives a snapshot."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from ..compat import flattened
from ..statistics.heads import NUM_FIELDS, NUM_SUMS, SUM_FIELDS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class Part(NamedTuple):
    """One layer's snapshot in one process; values are (NUM_FIELDS, H) fp64, as `HeadStats` holds them."""

    name: str
    head_dim: int
    dtype: str
    sample_period: int
    values: np.ndarray


@dataclass(frozen=True)
class ProcessGroups:
    """Which processes measure parts of one thing. Each of them has to read at the same steps.

    batch: processes that run the same heads on other sequences (DDP, FSDP).
    heads: processes that hold different heads of the same layers (tensor parallel, or a sequence exchanged
        for heads around attention, as Ulysses does); the heads of the first member come first, and are
        numbered from there on.
    queries: processes that run the same heads on other queries of the same sequences, against all of their keys
        (context parallel that gathers keys; a process may leave out keys that are hidden from its queries,
        as long as one sees them all).

    A process without a batch, or without some layer (another pipeline stage), takes part with nothing.
    Raises RuntimeError without torch.distributed, ValueError where all groups are None.
    """

    batch: ProcessGroup | None = None
    heads: ProcessGroup | None = None
    queries: ProcessGroup | None = None

    def __post_init__(self):
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("expected torch.distributed to be initialised, got no process group")
        if self.batch is self.heads is self.queries is None:
            raise ValueError("expected a process group for batch, heads or queries, got None for all")

    @staticmethod
    def of_world() -> ProcessGroups | None:
        """All processes of the run with parts of the batch; None where there is one process."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return None
        return ProcessGroups(batch=dist.group.WORLD)

    @staticmethod
    def of_mesh(mesh: DeviceMesh, heads: str | None = None, queries: str | None = None) -> ProcessGroups:
        """The mesh dimensions of tensor and context parallelism; all others hold parts of the batch.

        Raises ValueError for a name that the mesh does not have, or one that is given twice.
        """
        names = mesh.mesh_dim_names or ()
        for what, name in (("heads", heads), ("queries", queries)):
            if name is not None and name not in names:
                raise ValueError(f"expected {what} to be one of the mesh's dimensions {names}, got {name!r}")
        if heads is not None and heads == queries:
            raise ValueError(f"expected heads and queries to be different dimensions, got {heads!r} for both")
        others = tuple(name for name in names if name not in (heads, queries))
        if len(others) > 1:
            batch = flattened(mesh[others]).get_group()
        else:
            batch = mesh[others[0]].get_group() if others else None if names else mesh.get_group()
        return ProcessGroups(
            batch, *(None if name is None else mesh[name].get_group() for name in (heads, queries))
        )

    @property
    def processes(self) -> int:
        """How many processes' measurements are one."""
        groups = (self.batch, self.heads, self.queries)
        return math.prod(dist.get_world_size(group) for group in groups if group is not None)

    def combine(self, read: Callable[[], Iterable[Part]]) -> list[Part]:
        """What `read` gives in all processes, the same in each, in the order of the first one that has it.

        Raises RuntimeError in every process where `read` fails in one of them, or where processes of `batch`
        or `queries` hold different numbers of heads of one layer: none is left waiting for another.
        """
        parts, fault = [], None
        try:
            parts = list(read())
        except Exception as error:
            fault = f"process {dist.get_rank()}: {type(error).__name__}: {error}"
        for group, shared in ((self.queries, _OF_SEQUENCES), (self.heads, None), (self.batch, ())):
            if group is not None:
                parts, fault = _joined(parts, fault, group, shared)
        if fault is not None:
            raise RuntimeError(fault)
        return parts


_Key = tuple[str, int, str]
# Sums that every process of `queries` has whole: sequences are counted, and their keys squared, in each.
_OF_SEQUENCES = tuple(SUM_FIELDS.index(name) for name in ("sequences", "key_square"))


def _joined(
    parts: Sequence[Part], fault: str | None, group: ProcessGroup, shared: Sequence[int] | None
) -> tuple[list[Part], str | None]:
    """shared: the sums that every member has whole; None where each member has heads of its own."""
    split = shared is None
    mine = {(p.name, p.head_dim, p.dtype): p for p in parts}
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    everyone: list[tuple[str | None, dict[_Key, tuple[int, int]]] | None] = [None] * size
    described = {key: (p.values.shape[1], p.sample_period) for key, p in mine.items()}
    dist.all_gather_object(everyone, (fault, described), group=group)
    fault = next((theirs for theirs, _ in everyone if theirs is not None), None)
    widths: dict[_Key, list[int]] = {}
    periods: dict[_Key, int] = {}
    for member, (_, layers) in enumerate(everyone):
        for key, (heads, period) in layers.items():
            widths.setdefault(key, [0] * size)[member] = heads
            periods[key] = max(periods.get(key, 1), period)
    for key, heads in widths.items():
        if not split and len({number for number in heads if number}) > 1:
            fault = fault or f"expected every process to hold as many heads of {key[0]}, got {heads}"
    if fault is not None or not widths:
        return [], fault
    total = {key: sum(heads) if split else max(heads) for key, heads in widths.items()}
    packed = np.zeros((NUM_FIELDS, sum(total.values())))
    packed[NUM_SUMS:] = -np.inf
    start = 0
    for key, width in total.items():
        if key in mine:
            first = start + (sum(widths[key][:rank]) if split else 0)
            packed[:, first : first + widths[key][rank]] = mine[key].values
        start += width
    _reduce(packed, shared or (), group)
    ends = np.cumsum(list(total.values()))[:-1]
    columns = np.split(packed, ends, axis=1)
    return [Part(*key, periods[key], values) for key, values in zip(total, columns)], None


def _reduce(packed: np.ndarray, shared: Sequence[int], group: ProcessGroup) -> None:
    device = "cuda" if "nccl" in dist.get_backend(group) else "cpu"
    largest = np.arange(NUM_FIELDS) >= NUM_SUMS
    largest[list(shared)] = True
    for fields, operation in ((~largest, dist.ReduceOp.SUM), (largest, dist.ReduceOp.MAX)):
        numbers = torch.from_numpy(packed[fields]).to(device)
        dist.all_reduce(numbers, operation, group)
        packed[fields] = numbers.cpu().numpy()
