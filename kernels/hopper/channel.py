"""The ring of buffers between the warp that copies and the warps that compute."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .names import aggregate


@gluon.jit
def place_in_ring(step, SIZE: gl.constexpr):
    """Which of SIZE places a step takes. For a power of two this is one instruction, and products wait for it."""
    if SIZE & (SIZE - 1) == 0:
        return step & (SIZE - 1)
    else:
        return step % SIZE


@gluon.jit
def _parity(step, SIZE: gl.constexpr):
    """The parity of the round that a step is in."""
    if SIZE & (SIZE - 1) == 0:
        return (step & SIZE) // SIZE
    else:
        return step // SIZE & 1


@aggregate
class Channel:
    """Barriers of a ring of STAGES stages. Step s takes stage s % STAGES.

    full: a barrier a stage, at which copies arrive. empty: one at which the consumers arrive when they have read.
    Step s is round s // STAGES of its stage. The parity of the round tells a barrier which arrivals to wait for.
    """

    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    STAGES: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, full, empty, STAGES):
        self.full = full
        self.empty = empty
        self.STAGES = gl.constexpr(STAGES)

    @gluon.jit
    def stage(self, step):
        """Where the buffers of a step lie."""
        return place_in_ring(step, self.STAGES)

    @gluon.jit
    def ready(self, step):
        """The barrier to which the copies of a step report."""
        return self.full.index(self.stage(step))

    @gluon.jit
    def wait_empty(self, step):
        """Until the consumers have read what lay in a step's stage. The first round finds every stage empty."""
        mbarrier.wait(self.empty.index(self.stage(step)), _parity(step, self.STAGES) ^ 1)

    @gluon.jit
    def wait_full(self, step):
        """Until the copies of a step have arrived."""
        mbarrier.wait(self.full.index(self.stage(step)), _parity(step, self.STAGES))

    @gluon.jit
    def release(self, step):
        """Say that a consumer has read a step's buffers."""
        mbarrier.arrive(self.empty.index(self.stage(step)), count=1)


@gluon.jit
def barriers(STAGES: gl.constexpr, COUNT: gl.constexpr):
    """STAGES barriers, each for COUNT arrivals."""
    found = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(found.index(stage), count=COUNT)
    return found


@gluon.jit
def new_channel(STAGES: gl.constexpr, CONSUMERS: gl.constexpr):
    """A channel from one producer."""
    return Channel(barriers(STAGES, 1), barriers(STAGES, CONSUMERS), STAGES)
