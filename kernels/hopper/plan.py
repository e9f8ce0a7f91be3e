"""What the sm_90 forward is compiled for, and the sizes of its tiles."""

from dataclasses import dataclass

from triton.experimental.gluon import language as gl

HALF_M = 64  # query rows of a consumer
BLOCK_M = 2 * HALF_M
BLOCK_N = 128  # keys of a tile
WIDE, WIDE_BLOCK_N = 128, 64  # head dimensions above the first take the second
HALF_ROWS = gl.constexpr(HALF_M)
# Where bounds of rows come from, beside the causal mask and the window: see `places` and `records`.
NO_TABLE, PACK_TABLE, MASK_TABLE = 0, 1, 2


@dataclass(frozen=True)
class Plan:
    """Everything that a compiled kernel is made for; `stages` and the last three fields change its speed alone."""

    is_causal: bool
    ragged: bool  # the keys are no multiple of BLOCK_N
    stats: bool
    block_d: int
    block_dv: int
    stages: int  # depth of the key and value rings, within what fits the shared memory
    has_sinks: bool = False
    is_windowed: bool = False
    table: int = NO_TABLE
    # Halves of tiles that one consumer need not look at, since none of its rows sees a key there: the right half of a
    # block's last tile for its upper rows, the left half of its first one for its lower rows.
    half_last: bool = False
    half_first: bool = False
    early: bool = False  # wait for the next keys before the exponentials, not after them
    by_threes: bool = False  # find the largest and the smallest score among integers, three at once
    # Read the unit of the scores from shared memory, once a block: the assembler orders the inner loop otherwise.
    shared_unit: bool = False

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
        """Whether rows have two bounds in more than a block's last tile, or tiles are small."""
        return self.is_windowed or self.is_masked or self.is_wide

    @property
    def bounded(self) -> bool:
        """Whether some rows may see no key, or not the first keys of their last tile."""
        return self.intervals or self.is_pack

    @property
    def half_left_seen(self) -> bool:
        """Whether the lower rows of a block see every key of the left half of its last tile."""
        return self.half_last and not self.is_pack and self.is_windowed == self.half_first

    @property
    def two_firsts(self) -> bool:
        """Whether blocks of a pack with rows of one sequence take the causal mask's first tile, which is plainer.

        With both kinds of first tiles D = 128 spills and loses 2 to 3%, D = 64 gains 1%.
        """
        causal = self.is_pack and self.half_last and not self.is_windowed
        return causal and max(self.block_d, self.block_dv) == 64

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
        one = self.is_causal and not self.is_masked and not self.is_wide
        return self.intervals and not one
