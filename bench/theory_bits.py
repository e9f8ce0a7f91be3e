"""Are `required_bits` enough, and how many too many are they? Numbers stored in fewer and fewer bits, on a CPU.

The need is the smallest number of bits from which on every larger one meets the tolerance. There are three kinds of
cases: single rows of the families of bench/theory_rows.py, with q and k, scores or weights stored; whole heads of 32
rows, from what a snapshot keeps of them; and rows hill-climbed towards the bound. bench/theory_soundness.py runs them.
"""

import numpy as np
import torch
from theory_rows import FAMILIES, Case, exact, make, to_bits
from theory_search import climb

from hnf_attention import attention_stats, theory
from hnf_attention.engine import fold
from hnf_attention.engine.call import check
from hnf_attention.statistics.heads import HeadStats
from hnf_attention.theory.bits import STORED

ROWS_A_HEAD = 32

MOST_BITS = 45


def needed_bits(stored: str, case: Case, tolerance: float) -> int:
    """The bits from which on every number of bits up to MOST_BITS meets the tolerance, for one row."""
    true, extent = exact(case), case.v.amax(-2) - case.v.amin(-2)
    scores, _ = case.scores()
    enough = MOST_BITS
    for bits in range(MOST_BITS, 0, -1):
        if stored == "query_key":
            out = exact(Case(to_bits(case.q, bits), to_bits(case.k, bits), case.v))
        elif stored == "scores":
            out = to_bits(scores, bits).softmax(-1) @ case.v
        else:
            weights = (scores - scores.amax(-1, keepdim=True)).exp()
            out = to_bits(weights, bits) @ case.v / weights.sum(-1, keepdim=True)
        if not bool(((out - true).abs() <= tolerance * extent).all()):
            return enough
        enough = bits
    return enough


def predicted_bits(stored: str, case: Case, tolerance: float) -> tuple[float, ...]:
    """Bits predicted from the row's largest numbers (with and without its largest weight), from the whole row, and
    the typical bits."""
    scores, magnitude = (x[0].numpy() for x in case.scores())
    v, extent = case.v.numpy(), np.ptp(case.v.numpy(), axis=0)
    squares = (case.q.numpy() ** 2) @ (case.k.numpy() ** 2).T
    largest, each, single = {
        "query_key": (magnitude.max(), magnitude, np.sqrt(2.0 * squares[0]) * case.scale),
        "scores": (np.abs(scores).max(), np.abs(scores), np.abs(scores)),
        "weights": ((np.abs(v).max(0) / extent).max(), 1.0, 1.0),
    }[stored]
    # p_max is only as exact as scores in fp64.
    p_max = 1.0 / np.exp(scores - scores.max()).sum() - 2.0**-50 * (case.q.shape[-1] + 8) * magnitude.max()
    few = [theory.required_bits(stored, largest, tolerance, max_weight=weight) for weight in (p_max, None)]
    row = theory.required_bits_of_row(stored, scores, each, v, tolerance)
    typical = theory.required_bits_of_row(stored, scores, single, v, tolerance, typical=True)
    return *map(float, few), float(row), float(typical)


def bits_rows(cases: int, seed: int = 0) -> dict[str, dict]:
    """For each stored thing: cases, under-predictions, percentiles of predicted minus needed bits."""
    excess: dict[str, list[np.ndarray]] = {stored: [] for stored in STORED}
    names = list(FAMILIES)
    for i in range(cases):
        case = make(names[i % len(names)], seed + 7_000_003 + i, 1)
        tolerance = 10.0 ** -(1 + i % 3)
        for stored, found in excess.items():
            need = needed_bits(stored, case, tolerance)
            found.append(np.array(predicted_bits(stored, case, tolerance)) - need)
    result = {}
    for stored, found in excess.items():
        few, without, row, typical = np.array(found).T
        result[stored] = {
            "cases": len(found),
            "under_predictions": int((few < 0).sum() + (without < 0).sum() + (row < 0).sum()),
            "median_excess": float(np.median(few)),
            "median_excess_without_weight": float(np.median(without)),
            "median_excess_of_row": float(np.median(row)),
            "largest_excess": float(few.max()),
            "typical": np.percentile(typical, [5, 50, 95]).tolist(),
        }
    return result


def read(case: Case) -> HeadStats:
    """What a snapshot keeps of a head."""
    query, key = (x[None, None].float() for x in (case.q, case.k))
    options = dict(attn_mask=None, is_causal=False, scale=None, window_size=None, softcap=None, sinks=None)
    accumulator = fold.new_accumulator(1, query.device)
    checked = check(query, key, None, **options)
    fold.fold(accumulator, query, key, attention_stats(query, key), checked)
    return HeadStats(fold.collect([accumulator]).numpy(), query.shape[-1], "float32")


def bits_heads(cases: int, seed: int = 0) -> dict[str, dict]:
    """As `bits_rows`, for q and k of full precision, and of bf16, where 8 bits are always enough."""
    excess: dict[str, list[tuple[float, float]]] = {"fp64": [], "bf16": []}
    names = list(FAMILIES)
    for i in range(cases):
        whole = make(names[i % len(names)], seed + 9_000_003 + i, ROWS_A_HEAD)
        for kind, case in (("fp64", whole), ("bf16", whole.rounded(torch.bfloat16))):
            need, stats = needed_bits("query_key", case, theory.TOLERANCE), read(case)
            excess[kind].append((stats.required_bits.item() - need, stats.typical_bits.item() - need))
    result = {}
    for kind, found in excess.items():
        sound, typical = np.array(found).T
        result[kind] = {
            "cases": len(found),
            "under_predictions": int((sound < 0).sum()),
            "median_excess": float(np.median(sound)),
            "largest_excess": float(sound.max()),
            "typical": np.percentile(typical, [5, 50, 95]).tolist(),
        }
    return result


def climbed_bits(rows: int, steps: int) -> dict[str, float]:
    """Rows made worse step by step: the largest move of an output over the bound, for q and k in 3, 6 and 9 bits.

    The bound is that of the row's largest numbers and p_max. A move beyond it is an under-prediction.
    """
    found = {"rows": 0, "under_predictions": 0, "closest": 0.0}
    for start, bits in enumerate((3, 6, 9)):

        def reached(case: Case, bits: int = bits) -> torch.Tensor:
            stored = Case(to_bits(case.q, bits), to_bits(case.k, bits), case.v)
            extent = case.v.amax(-2) - case.v.amin(-2)
            moved = ((exact(stored) - exact(case)).abs().squeeze(-2) / extent).amax(-1)
            scores, size = (x.squeeze(-2).numpy() for x in case.scores())
            weight = np.exp(scores - scores.max(-1, keepdims=True))
            slack = 2.0**-50 * (case.q.shape[-1] + 8) * size.max(-1)
            rest = 1.0 - 1.0 / weight.sum(-1) + slack
            move = (2.0 * 2.0**-bits + 4.0**-bits) * size.max(-1)
            allowed = theory.bits._gain(move, np.clip(rest, 0.0, 1.0)) + 1e-12
            ratios = moved / torch.from_numpy(allowed)
            found["rows"] += len(ratios)
            found["under_predictions"] += int((ratios > 1.0).sum())
            found["closest"] = max(found["closest"], float(ratios.max()))
            return ratios

        for _ in climb(start, rows, steps, torch.float64, reached):
            pass
    return found
