"""Head statistics of several processes as one: each group exchanges names once and sums up twice per snapshot."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from ..compat import flattened
from ..errors import let_out
from ..statistics.fields import NUM_FIELDS, NUM_SUMS, SUM_FIELDS
from ..statistics.heads import Forwards, HeadStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class CallName(NamedTuple):
    """What tells the statistics of one snapshot apart.

    call: how many calls the layer made before in the same forward. training: they are of forwards under grad.
    shape: what the name ends in if the layer was called with several shapes or dtypes.
    """

    layer: str
    call: int = 0
    training: bool = True
    shape: str = ""


class Part(NamedTuple):
    """One layer's statistics in one process."""

    name: CallName
    stats: HeadStats


class Reading(NamedTuple):
    """What was measured since the last snapshot, in one process or in several together."""

    parts: list[Part]
    forwards: Forwards


class SharedFault(RuntimeError):
    """A process of the group could not read its statistics; every process of the group gets this error."""


@dataclass(frozen=True)
class ProcessGroups:
    """Which processes measure parts of one run. All of them have to read snapshots at the same steps.

    batch: processes that run the same heads on other sequences (DDP, FSDP).
    heads: processes that hold different heads of the same layers (tensor parallel, or a sequence exchanged
        for heads around attention, as Ulysses does). Heads are numbered over all members, those of the first
        member first.
    queries: processes that run the same heads on other queries of the same sequences, against all of their keys
        (context parallel: keys are gathered, or go round in a ring). A process may leave out keys that are hidden from
        its queries, and so may its mask, as long as the queries of one process see them all. Each process looks for
        sinks among its own queries. Nothing tells which of them are padding: set `instrumentation.query_mask`.
    time_limit: seconds that a process waits for the others at a log step. If one of them does not come, because it has
        failed, ended its monitor or calls `on_step` at other steps, each goes on with its own measurements.

    A process without a batch, or without some layer (another pipeline stage), takes part with nothing.
    Raises RuntimeError without torch.distributed, ValueError if all groups are None.
    """

    batch: ProcessGroup | None = None
    heads: ProcessGroup | None = None
    queries: ProcessGroup | None = None
    time_limit: float = 60.0

    def __post_init__(self) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("expected torch.distributed to be initialised, got no process group")
        if self.batch is self.heads is self.queries is None:
            raise ValueError("expected a process group for batch, heads or queries, got None for all")
        if isinstance(self.time_limit, bool) or not self.time_limit > 0:
            raise ValueError(f"expected time_limit to be seconds > 0, got {self.time_limit!r}")

    @staticmethod
    def of_world() -> ProcessGroups | None:
        """All processes of the run, each with a part of the batch; None if there is only one process."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return None
        return ProcessGroups(batch=dist.group.WORLD)

    @staticmethod
    def of_mesh(mesh: DeviceMesh, heads: str | None = None, queries: str | None = None) -> ProcessGroups:
        """heads, queries: the mesh dimensions of tensor and context parallelism; all others are batch.

        Raises ValueError for a name that the mesh does not have, or one that is given twice.
        """
        names = mesh.mesh_dim_names or ()
        for what, name in (("heads", heads), ("queries", queries)):
            if name is not None and name not in names:
                raise ValueError(f"expected {what} to be one of the mesh's dimensions {names}, got {name!r}")
        if heads is not None and heads == queries:
            raise ValueError(f"expected heads and queries to be different dimensions, got {heads!r} for both")
        others = tuple(name for name in names if name not in (heads, queries))
        batch: ProcessGroup | None
        if len(others) > 1:
            batch = flattened(mesh[others]).get_group()
        elif others:
            batch = mesh[others[0]].get_group()
        else:
            batch = None if names else mesh.get_group()
        split = [None if name is None else mesh[name].get_group() for name in (heads, queries)]
        return ProcessGroups(batch, heads=split[0], queries=split[1])

    @property
    def processes(self) -> int:
        """How many processes' measurements are put together."""
        return math.prod(dist.get_world_size(group) for group in self.groups)

    @property
    def groups(self) -> list[ProcessGroup]:
        """The groups that are there."""
        return [group for group in (self.queries, self.heads, self.batch) if group is not None]

    @property
    def members(self) -> list[int] | None:
        """The ranks of all processes whose measurements are put together; None if they are not known here.

        They are known for a single group, and for groups that make up the whole world together.
        """
        if len(self.groups) == 1:
            return dist.get_process_group_ranks(self.groups[0])
        world = dist.get_world_size()
        return list(range(world)) if self.processes == world else None

    @property
    def leads(self) -> bool:
        """Whether this process writes and logs what all of them get: the first one of each group does."""
        return all(dist.get_rank(group) == 0 for group in self.groups)

    def combine(self, read: Callable[[], Reading]) -> Reading:
        """Put together what `read` gives in all processes; every process gets the same.

        Raises SharedFault in every process if `read` fails in one of them, or if processes of `batch`
        or `queries` hold different numbers of heads of one layer. No process is left waiting for another.
        """
        reading = Reading([], Forwards())
        fault: str | None = None
        failed: Exception | None = None
        try:
            reading = read()
        except Exception as error:
            failed = error
            fault = f"process {dist.get_rank()}: {type(error).__name__}: {error}"
        for group, shared in ((self.queries, _OF_SEQUENCES), (self.heads, None), (self.batch, ())):
            if group is not None:
                reading, fault = _joined(reading, fault, group, shared)
        if failed is not None:
            let_out(failed)
            failed = None  # its traceback holds this frame
        if fault is not None:
            raise SharedFault(fault)
        return reading


_Key = tuple[CallName, int, str]  # name, head dimension, dtype: parts that are alike in these are one
# Sums that every process of `queries` has whole: each counts its sequences, and squares all of their keys.
_WHOLE = ("sequences", "key_square", "nonfinite_key", "nonfinite_value")
_OF_SEQUENCES = tuple(SUM_FIELDS.index(name) for name in _WHOLE)


class _Contribution(NamedTuple):
    """What one process says of itself before anything is summed up."""

    fault: str | None
    layers: dict[_Key, tuple[int, int]]  # number of heads, sample period
    forwards: Forwards


def _joined(
    reading: Reading, fault: str | None, group: ProcessGroup, shared: Sequence[int] | None
) -> tuple[Reading, str | None]:
    """The reading of all members of a group, and the first fault of any.

    shared: the sums that every member has whole; None if each member has heads of its own.
    """
    split, rank = shared is None, dist.get_rank(group)
    mine = {(part.name, part.stats.head_dim, part.stats.dtype): part.stats for part in reading.parts}
    everyone = _exchange(fault, mine, reading.forwards, group)
    fault = next((theirs.fault for theirs in everyone if theirs.fault is not None), None)
    widths: dict[_Key, list[int]] = {}  # number of heads in each member
    periods: dict[_Key, int] = {}
    for member, theirs in enumerate(everyone):
        for key, (heads, period) in theirs.layers.items():
            widths.setdefault(key, [0] * len(everyone))[member] = heads
            periods[key] = max(periods.get(key, 1), period)
    for key, each in widths.items():
        if not split and len({heads for heads in each if heads}) > 1:
            fault = fault or f"expected every process to hold as many heads of {key[0].layer}, got {each}"
    # Members of `batch` run other forwards; those of the other groups run parts of the same ones.
    counts = zip(*(theirs.forwards for theirs in everyone))
    forwards = Forwards(*(sum(each) if shared == () else max(each) for each in counts))
    if fault is not None or not widths:
        return Reading([], forwards), fault
    total = {key: sum(each) if split else max(each) for key, each in widths.items()}
    packed = np.zeros((NUM_FIELDS, sum(total.values())))
    packed[NUM_SUMS:] = -np.inf
    start = 0
    for key, width in total.items():
        if key in mine:
            first = start + (sum(widths[key][:rank]) if split else 0)
            packed[:, first : first + widths[key][rank]] = mine[key].values
        start += width
    _reduce(packed, shared or (), group)
    columns = np.split(packed, np.cumsum(list(total.values()))[:-1], axis=1)
    parts = [
        Part(name, HeadStats(values, head_dim, dtype, periods[name, head_dim, dtype]))
        for (name, head_dim, dtype), values in zip(total, columns)
    ]
    return Reading(parts, forwards), None


def _exchange(
    fault: str | None, mine: Mapping[_Key, HeadStats], forwards: Forwards, group: ProcessGroup
) -> list[_Contribution]:
    """What every member says of itself, by rank."""
    described = {key: (stats.num_heads, stats.sample_period) for key, stats in mine.items()}
    everyone = [_Contribution(fault, described, forwards)] * dist.get_world_size(group)
    dist.all_gather_object(everyone, everyone[0], group=group)
    return everyone


def _reduce(packed: np.ndarray, shared: Sequence[int], group: ProcessGroup) -> None:
    """Sum up `packed` over the group in place; of maxima, and of the sums `shared`, take the largest."""
    device = "cuda" if "nccl" in dist.get_backend(group) else "cpu"
    largest = np.arange(NUM_FIELDS) >= NUM_SUMS
    largest[list(shared)] = True
    for fields, operation in ((~largest, dist.ReduceOp.SUM), (largest, dist.ReduceOp.MAX)):
        numbers = torch.from_numpy(packed[fields]).to(device)
        dist.all_reduce(numbers, operation, group)
        packed[fields] = numbers.cpu().numpy()
