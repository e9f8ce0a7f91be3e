"""What the sm_90 forward is compiled for, and the sizes of its tiles."""

from dataclasses import dataclass

from triton.experimental.gluon import language as gl

HALF_M = 64  # query rows of a consumer
BLOCK_M = 2 * HALF_M
BLOCK_N = 128  # keys of a tile
WIDE, WIDE_BLOCK_N = 128, 64  # head dimensions above the first take the second
HALF_ROWS = gl.constexpr(HALF_M)
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
    def is_wide(self) -> bool:
        """Whether tiles are smaller, blocks of queries share one place, and outputs leave in parts of 64 columns."""
        return max(self.block_d, self.block_dv) > WIDE

    @property
    def block_n(self) -> int:
        """Keys of a tile."""
        return WIDE_BLOCK_N if self.is_wide else BLOCK_N

    @property
    def block_out(self) -> int:
        """Columns of the output that leave shared memory at once."""
        return 64 if self.is_wide else self.block_dv

    @property
    def query_slots(self) -> int:
        """How many blocks of queries shared memory holds."""
        return 1 if self.is_wide else self.stages

    @property
    def intervals(self) -> bool:
        """Whether rows have two bounds: visible keys may begin after the first key or be none, or tiles are small."""
        return self.is_windowed or self.table != NO_TABLE or self.is_wide

    @property
    def is_pack(self) -> bool:
        return self.table == PACK_TABLE

    @property
    def is_masked(self) -> bool:
        return self.table == MASK_TABLE

    @property
    def many_last(self) -> bool:
        """Whether more than the last tile of a block of queries may hold keys that some rows see and some do not.

        Where blocks of queries and tiles of keys are equally long, the causal mask cuts one tile.
        """
        one = self.is_causal and self.table != MASK_TABLE and not self.is_wide
        return self.intervals and not one
