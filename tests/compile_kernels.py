"""Compile the kernels for a card that is not there; run by tests/test_compile_kernels.py in a process of its own."""

from types import SimpleNamespace
from unittest import mock

import torch
from cases import Case
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hnf_attention.engine import fold
from hnf_attention.kernels.hopper import host
from hnf_attention.kernels.measure import beside, clip, columns, extremes, longest, mask_map, rows_asked
from hnf_attention.kernels.measure import fold as fold_kernel
from hnf_attention.kernels.portable import backward, forward, probe
from hnf_attention.kernels.shared import launch, packing
from hnf_attention.reference.context import UNKNOWN, Context
from hnf_attention.reference.extremes import new_result
from hnf_attention.statistics.rows import RowStats

CASES = (
    Case(
        2, 2, 2, 40, 40, 64, 64, is_causal=True
    ),  # without a user mask there is an unmasked loop beside the masked
    Case(
        1, 2, 2, 40, 40, 64, 64, is_causal=True, sinks=True, seqlens=(0, 10, 40), mask="bool", window_size=9
    ),
)


class Card(mock.MagicMock):
    """What Triton asks of a driver before it compiles."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0


class Forgets(dict):
    """What was compiled must not be launched."""

    def __setitem__(self, key, value):
        pass


def compile_all(case: Case) -> None:
    q, k, v, mask, sinks = case.tensors(torch.bfloat16)
    options = case.options(q, k, v, mask, sinks)
    out, *rows, _ = forward.forward(q, k, v, options, extended=False)
    probe.probe(q, k, options)
    if mask is None:  # the kernels of the other case take the compiler three times as long
        probe.probe(q, k, options, parts=2)
    gradients = (torch.empty_like(out), None, torch.zeros_like(rows[0]))
    backward.backward(q, k, v, options, out, *rows[:2], *gradients)
    accumulator = fold.new_accumulator(q.shape[1], q.device)
    sizes = torch.zeros(k.shape[:3]), torch.zeros(q.shape[:3])
    padded = [torch.zeros(x.shape[0], x.shape[2], dtype=torch.bool) for x in (q, k)]
    for context in (UNKNOWN, Context(*padded, torch.zeros(q.shape[:2], dtype=torch.int64), *sizes)):
        fold_kernel.fold(accumulator, q, k, RowStats(*rows), options, context, fold.kernel_layout())
    index = torch.zeros(*q.shape[:2], 32, dtype=torch.int64)
    columns.column_weights(q, k, rows[0], options, 32)
    calls = [extremes.Tensors(q, k, v, out), extremes.Tensors(q, k, v, None)]
    for call, left_out in list(zip(calls, (None, padded[0])))[0 if mask is None else 1 :]:
        result = new_result(q.shape[1], q.device)
        extremes.Launch([call], [result], options, left_out).run([call], 1, 0)
    columns.column_weights(q, k, rows[0][:, :, :32], options, 32, index)
    if mask is None and sinks is None:
        compile_gated(calls[0], options)
        compile_clip(q, k, options)


def compile_clip(q, k, options) -> None:
    """The launches of QK-clip within a forward."""
    top, *largest = torch.zeros(1 + q.shape[1])
    sizes = clip.CallSizes(longest.longest_squares(q, k), 0.1, 30.0, True, top, torch.stack(largest))
    for exact in (False, True):
        sizes.bounds(exact)
    for left_out in (None, torch.zeros(q.shape[0], q.shape[2], dtype=torch.bool)):
        sizes.rows(q, k, options, left_out)
    clip.scaled(q, sizes.factors)


def compile_gated(call: extremes.Tensors, options) -> None:
    """The launches of a CUDA graph."""
    q, k, v, out = call
    control = torch.zeros(1, dtype=torch.int64)
    result = new_result(q.shape[1], q.device)
    left_out = torch.zeros(q.shape[0], q.shape[2], dtype=torch.bool)
    extremes.SingleLaunch(call, options).run(result, control, call, 1, options)
    call = call._replace(out=None)
    extremes.SingleLaunch(call, options).run(result, control, call, 1, options)
    masked = options._replace(attn_mask=torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool))
    extremes.SingleLaunch(call, masked, True).run(result, control, call, 1, masked, left_out)
    mask_map.scan_mask(masked, q.shape[2], k.shape[2], None, control)
    rows_asked.rows_asked(torch.zeros(q.shape[:3]), left_out, 32, 8, control)
    rows = RowStats(*probe.probe(q, k, options, parts=1, control=control)[:4])
    weights = columns.column_weights(q, k, rows.lse, options, 32, control=control)
    context = Context(None, None, *beside.beside(weights, v, out, q.shape[2], 8, control))
    accumulator = torch.stack([fold.new_accumulator(q.shape[1], q.device)] * 2)
    fold_kernel.fold(accumulator, q, k, rows, options, context, fold.kernel_layout(), control)


# One of each form of the sm_90 forward, at each width.
HOPPER = (
    Case(1, 2, 2, 256, 256, 64, 64, is_causal=True),
    Case(1, 2, 2, 256, 256, 64, 64, is_causal=True, seqlens=(0, 100, 200)),
    Case(1, 1, 2, 256, 256, 64, 64, is_causal=True, window_size=128),
    Case(1, 2, 2, 256, 256, 128, 128, is_causal=True, seqlens=(0, 100, 200), sinks=True),
    Case(1, 1, 2, 256, 256, 64, 128, mask="bool"),
    Case(1, 1, 2, 256, 256, 256, 256, seqlens=(0, 100, 200), window_size=50),
)


def compile_hopper(case: Case) -> None:
    tensors = case.tensors(torch.bfloat16)
    card = SimpleNamespace(multi_processor_count=132)
    with mock.patch.object(torch.cuda, "get_device_properties", lambda device: card):
        host.forward(*tensors[:3], case.options(*tensors))


def main() -> None:
    compiled = set()
    run = JITFunction.run

    def compile_only(kernel, *arguments, grid, warmup, **keywords):
        compiled.add(kernel.fn.__name__)
        return run(kernel, *arguments, grid=grid, warmup=True, **keywords)

    driver.set_active(Card())
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(launch, "_compiled", Forgets()),
    ):
        for case in CASES:
            compile_all(case)
        for case in HOPPER:
            compile_hopper(case)
        for integers in (torch.int32, torch.int64):
            packing.sequence_bounds(torch.tensor([0, 10, 40], dtype=integers), 40)
    print(*sorted(compiled))


if __name__ == "__main__":
    main()
