"""The extremes of many attention calls, by one launch of `extremes_kernel`."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..shared.launch import launch
from ..shared.masks import call_of
from ..shared.plan import Options, ScorePlan, score_plan
from ..shared.tiles import Tiles, block_dim, ceil_div, probe_tiles
from .extremes_kernel import (
    FIELDS,
    ExtremesPlan,
    LeftOut,
    OneCall,
    extremes_kernel,
    single_extremes_kernel,
)

__all__ = ["FIELDS", "Launch", "SingleLaunch", "Tensors", "block_rows", "single_plan", "strides_of"]

# Elements of the output that a program holds, which leaves room for four programs, and tiles that it checks.
_TILE_ELEMENTS, _TILES = 2048, 4


class Tensors(NamedTuple):
    """The tensors of one call: of one dtype, with an inner stride of 1.

    query (B, H, M, D), key (B, H_kv, N, D), value (B, H_kv, N, D_v), out (B, H, M, D_v) or None.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    out: torch.Tensor | None


def block_rows(head_dim: int, dtype: torch.dtype, options: Options) -> int:
    """Rows of a block: one of each (batch, head) is taken in a forward."""
    return probe_tiles(head_dim, dtype, options).block_m


@functools.cache
def _plan(
    scores: ScorePlan,
    has_left_out: bool,
    has_out: bool,
    group: int,
    dims: tuple[int, int],
    tiles: Tiles,
    divisor: int,
    single: bool = False,
) -> ExtremesPlan:
    head_dim, value_dim = dims
    tile = max(16, _TILE_ELEMENTS // max(block_dim(head_dim), block_dim(value_dim)))
    return ExtremesPlan(
        **vars(scores),
        has_left_out=has_left_out,
        has_out=has_out,
        group=group,
        head_dim=head_dim,
        value_dim=value_dim,
        block_m=tiles.block_m,
        block_n=tiles.block_n,
        block_d=block_dim(head_dim),
        block_dv=block_dim(value_dim),
        chunk=_TILES * tile,
        tile=tile,
        divisor=divisor,
        single=single,
    )


def strides_of(call: Tensors) -> tuple[int, ...]:
    """Of the batch, the heads and the rows of each tensor, as `OneCall` has them."""
    query, key, value, out = call
    of_out = (0, 0, 0) if out is None else out.stride()[:3]
    return *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *of_out


@functools.lru_cache(maxsize=64)
def _on_device(numbers: tuple[int, ...], device: torch.device, stream: int) -> torch.Tensor:
    """int64 numbers on the device. A training step often finds its tensors where the step before had them.

    stream: the one that reads them, which alone waits for the copy.
    """
    table = torch.tensor(numbers, dtype=torch.int64, device="cpu")  # whatever the default device is
    if device.type == "cpu":
        return table
    return table.pin_memory().to(device, non_blocking=True)


def _programs(call: Tensors, plan: ExtremesPlan) -> int:
    """How many programs a call takes: one for each (batch, head), and those that check its outputs or inputs."""
    batch, heads, num_queries, _ = call.query.shape
    checked = num_queries if call.out is not None else max(num_queries, call.key.shape[2])
    return batch * heads * (1 + ceil_div(checked, plan.chunk))


def single_plan(call: Tensors, options: Options, leaves_out: bool) -> tuple[ExtremesPlan, Tiles]:
    """The plan of a kernel that takes one call as `OneCall`. leaves_out: whether queries may be left out."""
    query, key, value, out = call
    tiles = probe_tiles(query.shape[3], query.dtype, options)
    widths, group = (query.shape[3], value.shape[3]), query.shape[1] // key.shape[1]
    scores = score_plan(options)
    return _plan(scores, leaves_out, out is not None, group, widths, tiles, 1, single=True), tiles


class SingleLaunch:
    """The extremes of single calls of one shape, if `shared.control` asks for them. A CUDA graph may replay the launch.

    call, options: as for `Launch`; no tensor of them is kept. leaves_out: whether queries may be left out.
    """

    def __init__(self, call: Tensors, options: Options, leaves_out: bool = False) -> None:
        query, key = call[:2]
        batch, heads = query.shape[:2]
        self._plan, self._tiles = single_plan(call, options, leaves_out)
        self._device = query.device
        self._strides = strides_of(call)
        self._call = None if options.attn_mask is not None else call_of(query, key, options)
        self._window, self._probes = options.window_size or 0, batch * heads
        self._grid = _programs(call, self._plan), 1, 1
        self._aligned: Any = None  # the compiled kernel, for tensors that lie at multiples of 16 bytes

    def run(
        self,
        result: torch.Tensor,
        control: torch.Tensor,
        call: Tensors,
        phase: int,
        options: Options,
        left_out: torch.Tensor | None = None,
    ) -> None:
        """Raise a result, int32 (fields, H), contiguous. phase: added to the number of the forward in `control`.

        options: of the call, with its mask. left_out: boolean (B, M), queries that do not count.
        """
        together = result.data_ptr() | control.data_ptr()
        for x in call:
            if x is not None:
                together |= x.data_ptr()
        tensors, skipped = OneCall(*call, *self._strides), LeftOut(None, 0, 0)
        of_call = self._call if self._call is not None else call_of(call[0], call[1], options)
        if left_out is not None:
            skipped = LeftOut(left_out.view(torch.uint8), *left_out.stride())
        # Only alignment varies from call to call, so the kernel need not be looked up anew.
        if self._aligned is not None and not together & 15:
            numbers = self._window, phase, self._probes
            self._aligned[self._grid](result, control, tensors, skipped, of_call, *numbers, self._plan)
            return
        compiled = launch(
            single_extremes_kernel,
            self._grid,
            self._plan,
            self._device,
            {
                "result_ptr": result,
                "control_ptr": control,
                "tensors": tensors,
                "left_out": skipped,
                "call": of_call,
            },
            {"window": self._window, "phase": phase, "probes": self._probes},
            num_warps=self._tiles.num_warps,
            num_stages=self._tiles.num_stages,
        )
        if compiled is not None and self._call is not None and not together & 15:
            self._aligned = compiled


class Launch:
    """One launch for calls that are alike: in shapes, dtype, device, options, and whether the output is known.

    calls: head dimensions up to 256, not fp64; M and N are at least 1. results: int32 (fields, H) of each, contiguous.
    options: of all calls. left_out: boolean (B, M), queries that do not count. No tensor of a call is kept.
    """

    def __init__(
        self,
        calls: Sequence[Tensors],
        results: Sequence[torch.Tensor],
        options: Options,
        left_out: torch.Tensor | None,
    ) -> None:
        query, key, value, out = calls[0]
        batch, heads, num_queries, head_dim = query.shape
        self._device, self._results = query.device, results
        self._tiles = probe_tiles(head_dim, query.dtype, options)
        strides = [strides_of(call) for call in calls]
        self._fixed = tuple(
            number for result, own in zip(results, strides) for number in (result.data_ptr(), *own)
        )
        whole = 16 // query.element_size()
        self._divisor = 1 if any(stride % whole for own in strides for stride in own) else whole
        self._plan = functools.partial(
            _plan,
            score_plan(options),
            left_out is not None,
            out is not None,
            heads // key.shape[1],
            (head_dim, value.shape[3]),
            self._tiles,
        )
        self._left_out = LeftOut(None, 0, 0)
        if left_out is not None:
            self._left_out = LeftOut(left_out.view(torch.uint8), *left_out.stride())
        self._call = call_of(query, key, options)
        self._window = options.window_size or 0
        self._probes = batch * heads
        self._grid = _programs(calls[0], self._plan(1)), len(calls), 1

    def run(self, calls: Sequence[Sequence[torch.Tensor | None]], number: int, phase: int) -> None:
        """Raise the results by what one block of rows of each (batch, head) and the outputs show.

        calls: `Tensors`, with the shapes and strides of those that the launch was made for. number: of this forward,
        below 2^31. phase: counts the forwards; each takes the next block.
        """
        device, together, addresses = self._device, 0, []
        for call in calls:
            for x in call:
                address = 0 if x is None else x.data_ptr()
                addresses.append(address)
                together |= address
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        launch(
            extremes_kernel,
            self._grid,
            self._plan(1 if together % 16 else self._divisor),
            device,
            {
                "addresses_ptr": _on_device(tuple(addresses), device, stream),
                "fixed_ptr": _on_device(self._fixed, device, stream),
                "like": calls[0][0],
                "left_out": self._left_out,
                "call": self._call,
            },
            {"window": self._window, "number": -number, "phase": phase, "probes": self._probes},
            num_warps=self._tiles.num_warps,
            num_stages=self._tiles.num_stages,
        )
