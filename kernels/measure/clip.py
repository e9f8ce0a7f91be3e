"""QK-clip of a forward: sizes and factors of the heads, and queries times factors."""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..shared.descriptors import strided
from ..shared.launch import launch
from ..shared.masks import call_of
from ..shared.plan import Options, Plan
from ..shared.tiles import block_dim, ceil_div, grid_1d, scheduled_block
from .extremes import Tensors, single_plan, strides_of
from .extremes_kernel import LeftOut, OneCall, block_extremes, ordered, unordered

_BLOCK, _BYTES = 128, 65536  # rows that a program scales at once, and bytes: more would spill
_NOTHING = tl.constexpr(-0x7F800001)  # -inf, `ordered`


@dataclass(frozen=True, repr=False)
class BoundsPlan(Plan):
    """What the kernel of the bounds is compiled for."""

    block: int  # heads
    exact: bool  # sizes of wanted heads come from their rows


@dataclass(frozen=True, repr=False)
class ScaledPlan(Plan):
    """What the kernel of the queries is compiled for."""

    head_dim: int
    block: int
    block_d: int


@triton.jit
def _factor(size, threshold):
    """What brings a size down to the threshold; 1 within it, and for NaN and inf."""
    return tl.where((size > threshold) & (size < float("inf")), threshold / size, 1.0)


@triton.jit
def _raise(number_ptr, number, mask=None):
    """Take a number into a maximum in memory. NaN stays."""
    known = tl.load(number_ptr, mask=mask)
    tl.store(number_ptr, tl.where((number > known) | (number != number), number, known), mask=mask)


@triton.jit(do_not_specialize=["heads", "group"])
def _size_bounds_kernel(
    squares_ptr,
    found_ptr,
    sizes_ptr,
    wanted_ptr,
    factors_ptr,
    top_ptr,
    largest_ptr,
    scale,
    threshold,
    heads,
    group,
    PLAN: tl.constexpr,
):
    """Bounds of all heads, by the lengths of their longest query and key."""
    head = tl.arange(0, PLAN.block)
    inside = head < heads
    query = tl.load(squares_ptr + head, mask=inside, other=0.0)
    key = tl.load(squares_ptr + heads + head // group, mask=inside, other=0.0)
    bound = tl.sqrt_rn(query) * tl.sqrt_rn(key) * scale
    bound = tl.where(bound == bound, bound, float("inf"))  # inf times 0
    _raise(top_ptr, tl.max(bound, 0))
    tl.store(sizes_ptr + head, bound, mask=inside)
    if PLAN.exact:
        tl.store(wanted_ptr + head, (bound > threshold).to(tl.uint8), mask=inside)
        tl.store(found_ptr + head, tl.full([PLAN.block], _NOTHING, tl.int32), mask=inside)
    else:
        tl.store(factors_ptr + head, _factor(bound, threshold), mask=inside)
        _raise(largest_ptr + head, bound, inside)


@triton.jit(do_not_specialize=["window", "is_range"])
def _largest_rows_kernel(
    found_ptr, sizes_ptr, wanted_ptr, tensors, left_out, call, window, is_range, PLAN: tl.constexpr
):
    """The largest row of wanted heads, `ordered`, by all of their scores; inf where a row that counts has a NaN."""
    start_m, bh = scheduled_block(call.num_queries, PLAN.block_m, True)
    if bh >= call.num_bh:
        return
    batch, head = bh // call.heads, bh % call.heads
    if tl.load(wanted_ptr + head) == 0:
        return
    like = tensors.query_ptr
    if tl.load(sizes_ptr + head) < float("inf"):
        high, wide = block_extremes(tensors, like, left_out, call, window, batch, head, start_m, PLAN)
    else:  # a query or a key is not finite
        high, wide = block_extremes(tensors, like, left_out, call, window, batch, head, start_m, PLAN, True)
    tl.atomic_max(found_ptr + head, ordered(tl.where(is_range != 0, wide, high)), sem="relaxed")


@triton.jit(do_not_specialize=["heads"])
def _settle_kernel(
    found_ptr, sizes_ptr, wanted_ptr, factors_ptr, largest_ptr, threshold, heads, BLOCK: tl.constexpr
):
    """Sizes of wanted heads as their rows have them, the bound for the others, and factors of all."""
    head = tl.arange(0, BLOCK)
    inside = head < heads
    wanted = tl.load(wanted_ptr + head, mask=inside, other=0) != 0
    exact = unordered(tl.load(found_ptr + head, mask=inside, other=0))
    size = tl.where(wanted, exact, tl.load(sizes_ptr + head, mask=inside, other=0.0))
    tl.store(sizes_ptr + head, size, mask=inside)
    tl.store(factors_ptr + head, _factor(size, threshold), mask=inside)
    _raise(largest_ptr + head, size, inside)


class CallSizes:
    """Sizes and factors of the heads of one call, (H,) fp32 each.

    squares: (H + H_kv,) fp32, of `longest_squares`. is_range: whether a size is the range of a row, else its largest
    score. top, largest: () and (H,) fp32, the largest bound and the sizes of the calls before, which are raised.
    """

    def __init__(
        self,
        squares: torch.Tensor,
        scale: float,
        threshold: float,
        is_range: bool,
        top: torch.Tensor,
        largest: torch.Tensor,
    ):
        self._squares, self._top = squares, top
        self._scale = abs(scale) * (2.0 if is_range else 1.0)
        self._is_range, self._threshold, self._largest = is_range, threshold, largest
        sizes = torch.empty(2, len(largest), dtype=torch.float32, device=squares.device)
        self.sizes, self.factors = sizes.unbind()
        self._found = torch.empty(len(largest), dtype=torch.int32, device=squares.device)
        self.wanted = torch.empty(len(largest), dtype=torch.uint8, device=squares.device)

    def bounds(self, exact: bool) -> None:
        """Have bounds as sizes, and factors by them. exact: find `wanted` heads in place of factors."""
        heads = len(self._largest)
        launch(
            _size_bounds_kernel,
            (1, 1, 1),
            BoundsPlan(triton.next_power_of_2(heads), exact),
            self._squares.device,
            {
                "squares_ptr": self._squares,
                "found_ptr": self._found,
                "sizes_ptr": self.sizes,
                "wanted_ptr": self.wanted,
                "factors_ptr": self.factors,
                "top_ptr": self._top,
                "largest_ptr": self._largest,
                "scale": self._scale,
                "threshold": self._threshold,
            },
            {"heads": heads, "group": heads // (len(self._squares) - heads)},
            num_warps=1,
        )

    def rows(
        self, query: torch.Tensor, key: torch.Tensor, options: Options, left_out: torch.Tensor | None
    ) -> None:
        """Have exact sizes of the wanted heads, and all factors.

        query (B, H, M, D), key (B, H_kv, N, D), D <= 256. left_out: boolean (B, M), rows that do not count.
        """
        query, key = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key))
        call, heads, device = Tensors(query, key, key, None), len(self._largest), query.device
        plan, tiles = single_plan(call, options, left_out is not None)
        skipped = LeftOut(None, 0, 0)
        if left_out is not None:
            skipped = LeftOut(left_out.view(torch.uint8), *left_out.stride())
        blocks = ceil_div(query.shape[2], tiles.block_m)
        launch(
            _largest_rows_kernel,
            (grid_1d(blocks, query.shape[0] * heads), 1, 1),
            plan,
            device,
            {
                "found_ptr": self._found,
                "sizes_ptr": self.sizes,
                "wanted_ptr": self.wanted,
                "tensors": OneCall(query, key, key, None, *strides_of(call)),
                "left_out": skipped,
                "call": call_of(query, key, options),
            },
            {"window": options.window_size or 0, "is_range": int(self._is_range)},
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
        launch(
            _settle_kernel,
            (1, 1, 1),
            triton.next_power_of_2(heads),
            device,
            {
                "found_ptr": self._found,
                "sizes_ptr": self.sizes,
                "wanted_ptr": self.wanted,
                "factors_ptr": self.factors,
                "largest_ptr": self._largest,
                "threshold": self._threshold,
            },
            {"heads": heads},
            num_warps=1,
        )


@triton.jit(do_not_specialize=["heads", "num_rows"])
def _scaled_kernel(x, out, factors_ptr, heads, num_rows, PLAN: tl.constexpr):
    """out = x times the factor of the head, rounded once."""
    head = tl.program_id(0) % heads
    factor = tl.load(factors_ptr + head)
    batch = (tl.program_id(0) // heads).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * PLAN.block + tl.arange(0, PLAN.block)
    column = tl.arange(0, PLAN.block_d)
    inside = (row < num_rows)[:, None] & (column < PLAN.head_dim)[None, :]
    from_row = x.ptr + batch * x.stride_b + head.to(tl.int64) * x.stride_h + row * x.stride_m
    number = tl.load(from_row[:, None] + column[None, :], mask=inside)
    to_row = out.ptr + batch * out.stride_b + head.to(tl.int64) * out.stride_h + row * out.stride_m
    scaled = (number.to(tl.float32) * factor).to(number.dtype)
    tl.store(to_row[:, None] + column[None, :], scaled, mask=inside)


@functools.cache
def _scaled_plan(head_dim: int, size: int) -> ScaledPlan:
    """size: bytes of a number."""
    width = block_dim(head_dim)
    return ScaledPlan(head_dim, min(_BLOCK, _BYTES // (width * size)), width)


def scaled(x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """x (B, H, M, D), which has an inner stride of 1, times factors (H,) fp32."""
    batch, heads, num_rows, head_dim = x.shape
    out, plan = torch.empty_like(x), _scaled_plan(head_dim, x.element_size())
    launch(
        _scaled_kernel,
        (batch * heads, ceil_div(num_rows, plan.block), 1),
        plan,
        x.device,
        {"x": strided(x), "out": strided(out), "factors_ptr": factors},
        {"heads": heads, "num_rows": num_rows},
        num_warps=4,
    )
    return out
