"""Runs the sm_90 forward's own code on a CPU: threads for its parts, tensors of PyTorch for its registers.

Gluon has no interpreter. Here the functions of the kernel run as Python, with other globals: copies, products and
barriers do at once what the card does later, and a wait blocks until it may go on. Layouts are left out, so a mistake
in one stays unseen. What is computed, and in which order the parts may go on, is the kernel's own.
"""

import math
import threading
import types
from collections import namedtuple

import gluon_assembly
import torch

from hnf_attention.kernels.hopper import channel

WAIT = 20.0  # seconds until a part that cannot go on is a failure
_Type = namedtuple("_Type", "layout")


class Value(torch.Tensor):
    """A tensor with the methods that Triton's have. A scalar has no dimension."""

    @property
    def type(self):
        return _Type(None)

    def to(self, dtype, bitcast=False):
        if bitcast:  # unsigned numbers need more than 32 bits here
            if self.is_floating_point():
                bits = self.contiguous().view(torch.int32).long()
                return bits & 0xFFFFFFFF if dtype == _UINT32 else bits
            signed = torch.where(self >= 1 << 31, self - (1 << 32), self).int()
            return signed.view(dtype)
        return torch.Tensor.to(self, dtype)

    def split(self):
        return self[..., 0], self[..., 1]

    # `x += 1` gives a new tensor in Triton.
    def __iadd__(self, other):
        return self + other

    def __isub__(self, other):
        return self - other

    def __imul__(self, other):
        return self * other


_UINT32 = object()
LAYOUTS = [
    "SliceLayout",
    "NVMMADistributedLayout",
    "DistributedLinearLayout",
    "DotOperandLayout",
    "BlockedLayout",
    "SwizzledSharedLayout",
]


def value(number):
    """A scalar of a kernel."""
    return torch.tensor(int(number)).as_subclass(Value)


def run_together(threads):
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Pointer:
    """An address in a tensor, or one of every element of `offset`."""

    def __init__(self, tensor, offset=0):
        self.tensor, self.offset = tensor, offset

    def __add__(self, offset):
        return Pointer(self.tensor, self.offset + offset)

    def places(self):
        """The whole memory of the tensor in one line, and where in it this points."""
        size = self.tensor.untyped_storage().nbytes() // self.tensor.element_size()
        flat = torch.as_strided(self.tensor, (size,), (1,), 0)
        return flat, torch.as_tensor(self.offset) + self.tensor.storage_offset()

    def load(self, mask=None, other=0):
        flat, offset = self.places()
        if mask is None:
            return flat[offset].clone().as_subclass(Value)
        return torch.where(mask, flat[torch.where(mask, offset, 0)], other).as_subclass(Value)

    def store(self, number, mask=None):
        flat, offset = self.places()
        number = torch.as_tensor(number).to(self.tensor.dtype).expand(offset.shape)
        if mask is not None:
            mask = torch.as_tensor(mask).expand(offset.shape)
            offset, number = offset[mask], number[mask]
        flat[offset] = number


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all announced bytes have come."""

    def __init__(self, meeting):
        self.meeting, self.count, self.phase, self.pending, self.bytes = meeting, 0, 0, 0, 0

    def change(self, arrivals, number_of_bytes):
        with self.meeting:
            self.pending -= arrivals
            self.bytes += number_of_bytes
            assert self.pending >= 0, "more arrivals at a barrier than it counts"
            if self.pending == 0 and self.bytes == 0:
                self.phase ^= 1
                self.pending = self.count
            self.meeting.notify_all()


class Memory:
    """Shared memory; of barriers, a list of them."""

    def __init__(self, content):
        self.content = content
        self.shape = getattr(content, "shape", None)
        self.dtype = getattr(content, "dtype", None)

    def index(self, number):
        found = self.content[int(number)]
        return found if isinstance(found, Barrier) else Memory(found)

    def reshape(self, shape):
        return Memory(self.content.reshape(shape))

    def permute(self, order):
        return Memory(self.content.permute(order))

    def load(self, layout):
        return self.content.clone().as_subclass(Value)

    def store(self, x):
        self.content.copy_(x)


class Descriptor:
    """A tensor (B, H, L, D) and the block of it that one copy moves."""

    def __init__(self, given):
        self.tensor = given.base
        self.rows, self.width = given.block_shape[2:]
        self.dtype, self.layout = given.base.dtype, None
        self.block_type = namedtuple("Block", "nbytes")(self.rows * self.width * given.base.element_size())

    def part(self, place):
        batch, head, row, column = (int(x) for x in place)
        return self.tensor[batch, head, row : row + self.rows, column : column + self.width]


class Program:
    """One program of a launch: its number, its barriers, its three parts."""

    def __init__(self, number, launch):
        self.number, self.launch = number, launch
        self.meeting = threading.Condition()
        self.part = threading.local()  # its number

    def until(self, condition, what):
        with self.meeting:
            if not self.meeting.wait_for(lambda: condition() or self.launch.errors, WAIT):
                raise TimeoutError(f"a part waits for {what} in vain")
            if self.launch.errors:
                raise RuntimeError("another part failed")

    def run_parts(self, parts, *_):
        numbered = enumerate(parts)
        run_together([threading.Thread(target=self.guarded, args=(*part, i)) for i, part in numbered])

    def guarded(self, function, arguments, part=None):
        self.part.number = part
        try:
            function(*arguments)
        except Exception as error:
            self.launch.errors.append(error)
            with self.meeting:
                self.meeting.notify_all()

    def allocate(self, dtype, shape, layout):
        if layout == "barriers":
            return Memory([Barrier(self.meeting) for _ in range(shape[0])])
        # What nobody has written must not look right.
        return Memory(torch.full(shape, math.nan if dtype.is_floating_point else -7, dtype=dtype))

    def init(self, barrier, count):
        barrier.count = barrier.pending = count

    def wait(self, barrier, parity):
        self.until(lambda: barrier.phase != int(parity), "an mbarrier")

    def copy_in(self, descriptor, place, barrier, memory):
        found = descriptor.part(place)
        memory.content.zero_()
        memory.content[0, 0, : found.shape[0], : found.shape[1]] = found
        barrier.change(0, -descriptor.block_type.nbytes)

    def copy_out(self, descriptor, place, memory):
        target = descriptor.part(place)
        target.copy_(memory.content[0, 0, : target.shape[0], : target.shape[1]])


def matrix(x):
    return x.content.float() if isinstance(x, Memory) else x.float()


def product(a, b, acc, use_acc=True, is_async=False):
    found = matrix(a) @ matrix(b)
    return (acc + found if use_acc else found).as_subclass(Value)


def namespace(program):
    """What stands in for `gl` and `tl`, and for the other names of Gluon that the kernel imports."""
    launch = program.launch

    def elementwise(function):
        return lambda *x: function(*(torch.as_tensor(y) for y in x)).as_subclass(Value)

    def where(condition, a, b):
        return torch.where(torch.as_tensor(condition, dtype=torch.bool), a, b)

    def atomic_add(pointer, number, sem=None):
        with launch.lock:
            old = pointer.load()
            pointer.store(old + number)
            return old.long()

    def nothing(*_, **__):
        return None

    def static_assert(condition):
        assert condition

    gl = types.SimpleNamespace(
        float32=torch.float32,
        int32=torch.long,  # sums of 32-bit numbers that wrap around are masked where they are used
        int64=torch.long,
        uint32=_UINT32,
        to_tensor=value,
        program_id=lambda axis: value(program.number),
        num_programs=lambda axis: value(launch.programs),
        cdiv=lambda a, b: (a + b - 1) // b,
        arange=lambda start, end, layout=None: torch.arange(start, end).as_subclass(Value),
        full=lambda shape, x, dtype, layout=None: torch.full(shape, x, dtype=dtype).as_subclass(Value),
        expand_dims=lambda x, axis: x.unsqueeze(axis),
        convert_layout=lambda x, layout, assert_trivial=False: x,
        reshape=lambda x, shape: x.reshape(shape),
        join=lambda a, b: torch.stack([a, b], -1),
        max=lambda x, axis: x.amax(axis),
        min=lambda x, axis: x.amin(axis),
        sum=lambda x, axis: x.sum(axis),
        maximum=elementwise(torch.fmax),
        minimum=elementwise(torch.fmin),
        exp2=elementwise(torch.exp2),
        log2=elementwise(torch.log2),
        abs=elementwise(torch.abs),
        where=where,
        load=lambda pointer, mask=None, other=0: pointer.load(mask, other),
        store=lambda pointer, number, mask=None: pointer.store(number, mask),
        atomic_add=atomic_add,
        static_assert=static_assert,
        static_range=range,
        range=range,
        inline_asm_elementwise=gluon_assembly.run,
        allocate_shared_memory=program.allocate,
        warp_specialize=program.run_parts,
        **dict.fromkeys(LAYOUTS, nothing),
    )
    mbarrier = types.SimpleNamespace(
        MBarrierLayout=lambda: "barriers",
        init=program.init,
        wait=program.wait,
        expect=lambda barrier, number_of_bytes: barrier.change(1, number_of_bytes),
        arrive=lambda barrier, count: barrier.change(count, 0),
    )
    return {
        "gl": gl,
        "tl": gl,
        "mbarrier": mbarrier,
        "tma": types.SimpleNamespace(store_wait=nothing),
        "warpgroup_mma": product,
        "warpgroup_mma_wait": lambda count, results: results[0],
        "fence_async_shared": nothing,
        "barrier": nothing,
        "copy_in": program.copy_in,
        "copy_out": program.copy_out,
    }


def plain(found, stand_ins):
    """A global of a kernel: functions to be run here, constants as they are."""
    if found is channel.Channel:
        return channel_of(stand_ins)
    if type(found).__name__ == "constexpr":
        return found.value
    if isinstance(found, types.ModuleType):
        return types.SimpleNamespace(
            **{
                name: plain(x, stand_ins)
                for name, x in vars(found).items()
                if hasattr(x, "fn") or type(x).__name__ == "constexpr"
            }
        )
    if callable(getattr(found, "fn", None)):
        return function_of(found, stand_ins)
    return found


def function_of(kernel, stand_ins):
    fn = kernel.fn
    while hasattr(fn, "fn"):
        fn = fn.fn
    kept = []

    def run(*arguments, **keywords):
        if not kept:  # at its first call: functions may be defined behind those that call them
            names = dict(fn.__globals__)
            for name in set(fn.__code__.co_names) & names.keys():
                names[name] = stand_ins[name] if name in stand_ins else plain(names[name], stand_ins)
            kept.append(types.FunctionType(fn.__code__, names, fn.__name__, fn.__defaults__, fn.__closure__))
        return kept[0](*arguments, **keywords)

    return run


def channel_of(stand_ins):
    class Channel:
        def __init__(self, full, empty, STAGES):
            self.full, self.empty, self.STAGES = full, empty, STAGES

    for name in ("stage", "ready", "wait_empty", "wait_full", "release"):
        method = function_of(vars(channel.Channel)[name], stand_ins)
        setattr(Channel, name, lambda self, *x, method=method: method(self, *x))
    return Channel


class Launch:
    """All programs of one launch of the kernel, at the same time."""

    def __init__(self, programs):
        self.programs, self.errors, self.lock = programs, [], threading.Lock()

    def run(self, kernel, arguments):
        programs = [Program(number, self) for number in range(self.programs)]
        threads = [
            threading.Thread(
                target=program.guarded, args=(function_of(kernel, namespace(program)), arguments)
            )
            for program in programs
        ]
        run_together(threads)
        if self.errors:
            raise self.errors[0]


def argument(x):
    if isinstance(x, torch.Tensor):
        return Pointer(x)
    if isinstance(x, tuple):
        return tuple(argument(y) for y in x)
    if hasattr(x, "block_shape"):
        return Descriptor(x)
    return value(x) if isinstance(x, int) else x


def launch(kernel, grid, plan, arguments, numbers):
    """What `shared.launch.launch` does, for the kernel of the sm_90 forward."""
    given = [argument(x) for x in (*arguments.values(), *numbers.values())]
    Launch(grid[0]).run(kernel, (*given, plan))
