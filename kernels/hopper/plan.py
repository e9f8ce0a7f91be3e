"""What the sm_90 forward is compiled for, and the sizes of its tiles."""

from dataclasses import dataclass

from triton.experimental.gluon import language as gl

HALF_M = 64  # query rows of a consumer
BLOCK_M = 2 * HALF_M
BLOCK_N = 128
HALF_ROWS = gl.constexpr(HALF_M)
TILE_KEYS = gl.constexpr(BLOCK_N)
# Where bounds of rows come from, beside the causal mask and the window: see `records`.
NO_TABLE, PACK_TABLE, MASK_TABLE = 0, 1, 2


@dataclass(frozen=True)
class Plan:
    """Everything that a compiled kernel is made for; the first was tuned."""

    early: bool  # wait for the next keys before the exponentials, not after them
    is_causal: bool
    ragged: bool  # the keys are no multiple of BLOCK_N
    stats: bool
    block_d: int
    block_dv: int
    stages: int  # depth of the key and value rings: what fits the shared memory
    has_sinks: bool = False
    is_windowed: bool = False
    table: int = NO_TABLE

    def __repr__(self) -> str:  # part of the kernel's name
        return "plan_" + "_".join(str(int(x)).replace("-", "m") for x in vars(self).values())

    @property
    def intervals(self) -> bool:
        """Whether a row's visible keys may begin after the first key, or be none."""
        return self.is_windowed or self.table != NO_TABLE

    @property
    def is_pack(self) -> bool:
        return self.table == PACK_TABLE

    @property
    def is_masked(self) -> bool:
        return self.table == MASK_TABLE

    @property
    def many_last(self) -> bool:
        """Whether more than the last tile of a block of queries may hold keys that some rows see and some do not.

        Blocks of queries and tiles of keys are equally long. The causal mask therefore cuts one tile.
        """
        return self.intervals and not (self.is_causal and self.table != MASK_TABLE)
