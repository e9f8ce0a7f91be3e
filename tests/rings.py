"""PyTorch's context parallelism on CPUs, whose SDPA operator it has no ring of; and how a sequence is shared out."""

from contextlib import contextmanager

import torch
from torch.distributed.tensor import DTensor

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _wrapped(parts, like):
    return tuple(DTensor.from_local(x, like.device_mesh, like.placements, run_check=False) for x in parts)


def _local(*tensors):
    return [x._local_tensor for x in tensors]


@contextmanager
def rings_on_cpus():
    """Let PyTorch make a ring of the CPU's operator with its own functions, as it does of those of CUDA."""
    from torch.distributed.tensor.experimental._context_parallel import _attention as theirs

    def forward(op, args, kwargs):
        query, key, value, *rest = args
        causal = rest[1] if len(rest) > 1 else False
        found = theirs._templated_ring_attention(
            query.device_mesh.get_group(), 2, FLASH, *_local(query, key, value), is_causal=causal, **kwargs
        )
        return _wrapped(found[:2], query)

    def backward(op, args, kwargs):
        *tensors, _, causal = args
        names = ("grad_out", "query", "key", "value", "out", "logsumexp")

        def of_block(**given):
            return BACKWARD(*(given[name] for name in names), 0.0, given["is_causal"], scale=given["scale"])

        found = theirs._templated_ring_attention_backward(
            tensors[1].device_mesh.get_group(),
            2,
            of_block,
            grad_out_name="grad_out",
            is_causal=causal,
            scale=kwargs.get("scale"),
            **dict(zip(names, _local(*tensors))),
        )
        return _wrapped(found, tensors[1])

    mine = {FLASH: forward, BACKWARD: backward}
    theirs.custom_ops.update(mine)
    try:
        yield theirs
    finally:
        for operator in mine:
            del theirs.custom_ops[operator]


def places(rank, size, length, balanced):
    """The positions of a process's tokens: two pieces of 2 x size, of the beginning and of the end, or one of size."""
    if not balanced:
        return torch.arange(length).chunk(size)[rank]
    pieces = torch.arange(length).chunk(2 * size)
    return torch.cat([pieces[rank], pieces[-1 - rank]])
