"""Faults to plant in the kernels, one at a time: (file, what it says, what it is made to say).

Left out are changes that change nothing on a CPU, such as the checks of strides and addresses for the bulk-copy engine.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """One fault; `old` occurs once in the file."""

    file: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.file}: {self.old.strip()!r} -> {self.new.strip()!r}"


SOFTMAX, MASKS = "kernels/shared/softmax.py", "kernels/shared/masks.py"
ATTEND, GRADIENT = "kernels/portable/attend.py", "kernels/portable/gradient.py"
BACKWARD, PROBE = "kernels/portable/backward.py", "kernels/portable/probe.py"
DQ, DKV, FORWARD = "kernels/portable/dq.py", "kernels/portable/dkv.py", "kernels/portable/forward.py"
PACKING, TILES, RESULTS = "kernels/shared/packing.py", "kernels/shared/tiles.py", "kernels/shared/results.py"
PLAN, FOLD = "kernels/shared/plan.py", "kernels/measure/fold_kernel.py"
EXTREMES = "kernels/measure/extremes_kernel.py"

MUTANTS = (
    # The running softmax
    Mutant(SOFTMAX, "(state.m - shift) * unit)\n    alpha", "(shift - state.m) * unit)\n    alpha"),
    Mutant(SOFTMAX, "w = alpha * (state.w + state.l * d) + tl.sum(pt, 1)", "w = alpha * state.w + tl.sum(pt, 1)"),
    Mutant(SOFTMAX, "state.l * alpha + tl.sum(p, 1)", "state.l + tl.sum(p, 1)"),
    Mutant(SOFTMAX, "low = tl.minimum(state.low,", "low = tl.maximum(state.low,"),
    Mutant(SOFTMAX, "m = tl.maximum(state.m, tl.max(s, 1))", "m = tl.max(s, 1)"),
    Mutant(SOFTMAX, "t = (s - shift[:, None]) * unit", "t = s - shift[:, None]"),
    Mutant(SOFTMAX, "-(shift * unit)[:, None]", "-shift[:, None]"),
    Mutant(SOFTMAX, "pt = tl.where(seen, p * t, 0.0) if MASKED else p * t", "pt = p * t"),
    Mutant(SOFTMAX, "(more.b + d * (2.0 * state.w + d * state.l))", "(more.b + d * (state.w + d * state.l))"),
    Mutant(SOFTMAX, "c = alpha * alpha * more.c", "c = alpha * more.c"),
    Mutant(SOFTMAX, "more.first * alpha)", "more.first)"),
    Mutant(SOFTMAX, "apart * apart * count * share", "apart * apart * share"),
    Mutant(SOFTMAX, "return mean + apart * share, m2, total", "return mean + apart, m2, total"),
    Mutant(SOFTMAX, "first = tl.where(unseen, weight, more.first)", "first = weight"),
    Mutant(SOFTMAX, "beta * (b.w + b.l * d_b)", "beta * b.w"),
    Mutant(SOFTMAX, "tl.minimum(a.low, b.low)", "a.low"),
    Mutant(SOFTMAX, "w_i = factor * (w_i + l_i * d) + e_sink * z", "w_i = factor * w_i + e_sink * z"),
    Mutant(SOFTMAX, "log_l = tl.log2(l_safe) * LN_2", "log_l = tl.log2(l_safe)"),
    Mutant(SOFTMAX, "log_l - LN_2 * w_i / l_safe", "log_l - w_i / l_safe"),
    Mutant(SOFTMAX, "extended, factor / l_safe", "extended, 1.0 / l_safe"),
    Mutant(SOFTMAX, "nan, state.m * to_natural)", "nan, state.m)"),
    Mutant(SOFTMAX, "tl.where(tl.abs(m) < units.limit,", "tl.where(m < units.limit,"),
    Mutant(SOFTMAX, "_LARGEST_PRODUCT = tl.constexpr(134217728.0)", "_LARGEST_PRODUCT = tl.constexpr(1e30)"),
    Mutant(SOFTMAX, "log_denominator -= LN_2 * d", "log_denominator += LN_2 * d"),
    Mutant(SOFTMAX, "collision = more.c / (l_safe * l_safe)", "collision = more.c / l_safe"),
    # Masks, and the tiles that they leave
    Mutant(MASKS, "seen = columns <= tl.where(", "seen = columns < tl.where("),
    Mutant(MASKS, "last = tl.minimum(rows, last)", "last = tl.minimum(rows + 1, last)"),
    Mutant(MASKS, "rows + (window - 1)", "rows + window"),
    Mutant(MASKS, "(rows - columns < window)", "(rows - columns <= window)"),
    Mutant(MASKS, "last = end - 1", "last = end"),
    Mutant(MASKS, "(columns >= first)", "(columns > first)"),
    Mutant(MASKS, "(rows < end)", "(rows <= end)"),
    Mutant(MASKS, "slope = 1.0 - tanh * tanh", "slope = 1.0 - tanh"),
    Mutant(MASKS, "(2.0 * LOG2_E / call.softcap)", "(LOG2_E / call.softcap)"),
    Mutant(MASKS, "seen = seen & (bias != -float(\"inf\"))", "seen = seen"),
    Mutant(MASKS, "seen = seen & (tile != 0)", "seen = seen"),
    Mutant(MASKS, "columns.to(tl.int64) * call.mask_stride_n", "columns.to(tl.int64)"),
    Mutant(MASKS, "head.to(tl.int64) * call.mask_stride_h", "head.to(tl.int64) * call.mask_stride_m"),
    Mutant(MASKS, "full_hi = num_keys // BLOCK_N * BLOCK_N", "full_hi = num_keys"),
    Mutant(MASKS, "hi = tl.minimum(hi, start_m + BLOCK_M)\n", "hi = tl.minimum(hi, start_m)\n"),
    Mutant(MASKS, "full_hi = tl.minimum(full_hi, (start_m + 1)", "full_hi = tl.minimum(full_hi, (start_m + BLOCK_M)"),
    Mutant(MASKS, "lo = tl.maximum(start_m - window + 1, 0)", "lo = tl.maximum(start_m - window + BLOCK_N, 0)"),
    Mutant(MASKS, "start_m + BLOCK_M - window + BLOCK_N - 1", "start_m - window + BLOCK_N"),
    Mutant(MASKS, "start_m + BLOCK_M - 1 + window", "start_m + window"),
    Mutant(MASKS, "lo = tl.maximum(lo, first //", "lo = tl.maximum(lo, last_first //"),
    Mutant(MASKS, "(last_first + BLOCK_N - 1)", "(first + BLOCK_N - 1)"),
    Mutant(MASKS, "hi = tl.minimum(hi, last_end)", "hi = tl.minimum(hi, end)"),
    Mutant(MASKS, "full_hi = tl.minimum(full_hi, end //", "full_hi = tl.minimum(full_hi, last_end //"),
    # The walk over the keys
    Mutant(ATTEND, "kv_head = head // PLAN.group", "kv_head = head"),
    Mutant(ATTEND, "elif PLAN.natural:\n            s = s * call.scale", "elif PLAN.natural:\n            s = s * 1.0"),
    Mutant(ATTEND, "tl.fma(s, call.scale, 0.0)", "s"),
    Mutant(ATTEND, "acc * alpha[:, None]", "acc"),
    Mutant(ATTEND, "first = lo + part * size", "first = lo + part * PLAN.block_n"),
    Mutant(ATTEND, ".to(tl.float32) / to_natural", ".to(tl.float32)"),
    Mutant(ATTEND, "w += tl.sum(tl.where(seen, raw * 0.0, 0.0) if MASKED else raw * 0.0, 1)", "w += 0.0"),
    Mutant(ATTEND, "(SCATTERED or start_n == lo)", "start_n == lo"),
    Mutant(FORWARD, "result = acc * normalise[:, None]", "result = acc"),
    Mutant(FORWARD, "inside = offs_m < call.num_queries", "inside = offs_m <= call.num_queries"),
    Mutant(FORWARD, "offs_m[:, None].to(tl.int64) * out.stride_m", "offs_m[:, None].to(tl.int64) * PLAN.value_dim"),
    # Gradients
    Mutant(GRADIENT, "unit = LOG2_E if PLAN.natural else call.scale * LOG2_E", "unit = LOG2_E"),
    Mutant(GRADIENT, "inner = dp - offset", "inner = dp + offset"),
    Mutant(GRADIENT, "inner -= scaled_d_entropy * t", "inner += scaled_d_entropy * t"),
    Mutant(GRADIENT, "ds = d_score * slope", "ds = d_score"),
    Mutant(GRADIENT, "        ds = tl.where(p == 0.0, p, ds)\n", ""),
    Mutant(GRADIENT, "(lo, start_n // PLAN.block_m", "(lo, (start_n + PLAN.block_m) // PLAN.block_m"),
    Mutant(GRADIENT, "(start_n + PLAN.block_n + PLAN.block_m - 2)", "(start_n + PLAN.block_m - 1)"),
    Mutant(GRADIENT, "tl.where(start < tiles[1], 0,", "tl.where(start <= tiles[1], 0,"),
    Mutant(DQ, "dq = (dq * call.scale)", "dq = dq"),
    Mutant(DQ, "(offs_d[None, :] < PLAN.head_dim)", "(offs_d[None, :] <= PLAN.head_dim)"),
    Mutant(DQ, ".to(tl.int64) * call.num_queries * call.num_keys", ".to(tl.int64) * call.num_keys * call.num_keys"),
    Mutant(DKV, "head = kv_head * PLAN.group + member", "head = kv_head + member"),
    Mutant(DKV, "dk = (dk * call.scale)", "dk = dk"),
    Mutant(DKV, "batch * (call.heads * PLAN.group) + head", "batch * call.heads + head"),
    Mutant(DKV, "(offs_dv < PLAN.value_dim)", "(offs_dv < PLAN.head_dim)"),
    Mutant(BACKWARD, "float(\"inf\"), lse * LOG2_E)", "float(\"inf\"), lse)"),
    Mutant(BACKWARD, "offset -= tl.load(d_lse_ptr", "offset += tl.load(d_lse_ptr"),
    Mutant(BACKWARD, "offset += d_entropy * tl.load(entropy_ptr", "offset -= d_entropy * tl.load(entropy_ptr"),
    Mutant(BACKWARD, "d_entropy * LN_2", "d_entropy"),
    Mutant(BACKWARD, "tl.abs(lse) >= _LARGEST_LSE", "tl.abs(lse) < 0.0"),
    Mutant(BACKWARD, "offs_m[:, None].to(tl.int64) * out.stride_m", "offs_m[:, None].to(tl.int64) * d_out.stride_m"),
    Mutant(BACKWARD, "(torch.empty if walks_all else torch.zeros)", "torch.empty"),
    Mutant(BACKWARD, "else value.new_zeros(value.shape)", "else value.new_empty(value.shape)"),
    Mutant(RESULTS, "-offset - d_entropy * log_p", "-offset + d_entropy * log_p"),
    # Probes, samples, packs
    Mutant(PROBE, "(phase + ((fraction", "(phase + 1 + ((fraction"),
    Mutant(PROBE, "tl.where(inside, core.lse, -infinity)", "tl.where(inside, core.lse, 0.0)"),
    Mutant(PROBE, "head = row // row_length % heads", "head = row // row_length * 0"),
    Mutant(PROBE, "unit = (1.0 if PLAN.natural else scale) * LOG2_E", "unit = LOG2_E"),
    Mutant(PACKING, "(number <= values", "(number < values"),
    Mutant(PACKING, "tl.minimum(index + 1, num_sequences)", "tl.minimum(index, num_sequences)"),
    Mutant(TILES, "block = num_blocks - 1 - block", "block = num_blocks - 2 - block"),
    Mutant(TILES, "group * _HEAD_GROUP + inside % _HEAD_GROUP", "inside % _HEAD_GROUP"),
    Mutant(TILES, "inside = (row + rows < source.length)", "inside = (row + rows <= source.length)"),
    Mutant(PLAN, " or scores.has_softcap or scores.has_bias", " or scores.has_softcap"),
    # What is measured beside
    Mutant(FOLD, "last - first + 1, 0)", "last - first, 0)"),
    Mutant(FOLD, "rest = entropy + _log_of(weight_on)", "rest = entropy - _log_of(weight_on)"),
    Mutant(EXTREMES, "high = tl.maximum(high, tl.max(s, 1))", "high = tl.max(s, 1)"),
    Mutant(EXTREMES, "head // PLAN.group, PLAN)\n    offs_m", "head, PLAN)\n    offs_m"),
)  # fmt: skip
