"""What the PTX of the sm_90 forward computes, in PyTorch, for `gluon_on_cpu`. test_hopper_assembly.py runs the PTX."""

import math

import torch

from hnf_attention.kernels.hopper import assembly


def largest(s, m):
    """The largest of each row and of m: among integers, where m has no sign in all 16 rows of a warp."""
    numbers = torch.cat([s, m], 1)
    as_integers = numbers.view(torch.int32).amax(1, keepdim=True).clamp(max=0x7F800000).view(torch.float32)
    as_numbers = numbers.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).amax(1, keepdim=True)
    signs = (m.view(torch.int32) < 0).reshape(-1, 16).any(1).repeat_interleave(16)
    return torch.where(signs[:, None], as_numbers, as_integers).expand_as(s)


OF_THREADS = {
    "RESCALE": lambda x, alpha: x * alpha,
    "LARGEST": largest,
    "LEAST": lambda x: x.amin(1, keepdim=True).expand_as(x),
}


def run(text, operands, arguments, _dtype, _pure, pack):
    """What `inline_asm_elementwise` gives for a text of the kernel."""
    if text == assembly.HIDE_UNLESS_LESS.value:
        s, distance, number = arguments
        return torch.where((distance & 0xFFFFFFFF) < number, s, assembly.HIDDEN.value)
    if text == assembly.ZERO_WHERE_EQUAL.value:
        return torch.where(arguments[0] == arguments[1], 0.0, arguments[0])
    if text == "mov.b32 $0, $1;":
        return arguments[0]
    held = arguments[0].shape[1] // 2  # numbers of a thread: four share two rows
    assert pack == held
    for name, function in OF_THREADS.items():
        if text == getattr(assembly, f"{name}_{held}").value:
            assert operands == getattr(assembly, f"{name}_{held}_OPERANDS").value
            return function(*arguments)
    raise AssertionError(f"no assembly over {held} numbers: {text}")
