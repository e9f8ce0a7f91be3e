"""Do the theory's bounds hold, and how tight are they? Simulated roundings against fp64, on a CPU.

    python bench/theory_soundness.py OUT.json [rows]

Error bounds are tested on `rows` (default 200,000) random rows of 11 families per mode, on hill-climbed rows, and on
rows of a trained model. A mode is bf16 or fp16, flash or eager. The tightness of a row is max bound / max |error| over
its components; rows whose output is exact (to fp32) are left out. Bits are tested on 2,000 rows and on heads, see
bench/theory_bits.py. Exit code 1 if a bound is broken, or if bits that should be enough are not.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np

root = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(root), str(root / "bench")]

import torch
from machine import machine
from theory_bits import bits_heads, bits_rows, climbed_bits
from theory_rows import DTYPES, FAMILIES, Case, exact, make, simulate
from theory_search import climb, minilm

from hnf_attention import theory

ROWS_A_CASE = 32
MODES = [(name, kind) for kind in ("flash", "eager") for name in DTYPES]
MOST_BROKEN = 5


class Tally:
    """The rows judged in one mode: their number, the number of broken bounds, and the tightness of each level."""

    def __init__(self):
        self.rows = self.violations = 0
        self.ratios = {"row": [], "p_max": [], "norms": []}
        self.closest = 0.0  # largest error over bound, both before the output's rounding
        self.expected: list[np.ndarray] = []
        self.broken: list[dict[str, float]] = []  # the first MOST_BROKEN outputs beyond a bound

    def to_dict(self) -> dict:
        found = {"rows": self.rows, "violations": self.violations, "closest": self.closest}
        for level, ratios in self.ratios.items():
            known = np.concatenate([[], *ratios])
            found[f"median_{level}"] = float(np.median(known)) if known.size else None
        if self.expected:
            found["expected_over_actual"] = np.percentile(np.concatenate(self.expected), [5, 50, 95]).tolist()
        if self.broken:
            found["broken"] = self.broken
        return found


def bounds(case: Case, arithmetic: theory.Arithmetic) -> dict[str, np.ndarray]:
    """The bounds of the three levels, and of `before_rounding`.

    Those of a whole row are (..., D_v). Those from p_max and from norms are (..., 1), one for all components.
    """
    d, n = case.q.shape[-1], case.k.shape[-2]
    scores = case.scores()[0].numpy()
    value = case.v.numpy()[..., None, :, :]
    p_max = np.exp(scores.max(-1) - np.logaddexp.reduce(scores, -1))
    norms = case.scale * case.q.norm(dim=-1).numpy() * case.k.norm(dim=-1).amax(-1).numpy()[..., None]
    top = np.abs(value).max((-1, -2))
    extent = np.ptp(value, axis=-2).max(-1)
    levels = {"row": _of_row(case, arithmetic), "before rounding": before_rounding(case, arithmetic)}
    for name, weight in (("p_max", p_max), ("norms", None)):
        bound = theory.forward_error_bound_from_norms(norms, top, extent, d, n, arithmetic, max_weight=weight)
        levels[name] = bound[..., None]
    return levels


def judge(case: Case, name: str, kind: str, tally: Tally) -> None:
    dtype = DTYPES[name]
    case = case.rounded(dtype)
    arithmetic = getattr(theory, kind)(dtype)
    true = exact(case)
    rounded, before = simulate(case, dtype, kind)
    levels = bounds(case, arithmetic)
    error, moved = record(tally, true, rounded, before, levels)
    scores, size = (x.numpy() for x in case.scores())
    value = case.v.numpy()[..., None, :, :]
    rms = theory.expected_error(scores, size, value, arithmetic, scale=case.scale)
    actual = np.sqrt((error**2).mean(-1))
    tally.expected.append((np.sqrt((rms**2).mean(-1))[moved] / actual[moved]).ravel())


def record(
    tally: Tally,
    true: torch.Tensor,
    rounded: torch.Tensor,
    before: torch.Tensor,
    levels: dict[str, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Add outputs (..., M, D_v), after and before their rounding, to the tally.

    Returns the errors, and which rows have one that is larger than fp32's rounding.
    """
    error = (rounded - true).abs().numpy()
    tally.rows += int(np.prod(error.shape[:-1]))
    broken = ~(error <= levels["row"])
    for level in ("p_max", "norms"):
        broken |= ~(error <= levels[level])
    reached = ratio((before - true).abs().numpy(), levels["before rounding"])
    broken |= ~(reached <= 1.0)
    tally.violations += int(broken.any(-1).sum())
    numbers = {"true": true.numpy(), "output": rounded.numpy(), **levels}
    for place in np.argwhere(broken)[: MOST_BROKEN - len(tally.broken)]:
        at = {name: np.broadcast_to(x, broken.shape)[tuple(place)].item() for name, x in numbers.items()}
        tally.broken.append(at)
    tally.closest = max(tally.closest, float(reached.max()))
    worst = error.max(-1)
    # A row that is exact, except for the last bit of an fp32 sum, does not show how tight a bound is.
    moved = worst > 2.0**-22 * np.abs(true.numpy()).max(-1)
    for level, ratios in tally.ratios.items():
        ratios.append((levels[level].max(-1)[moved] / worst[moved]).ravel())
    return error, moved


def before_rounding(case: Case, arithmetic: theory.Arithmetic) -> np.ndarray:
    """The bound of a row's fp32 output, (..., D_v), before the last rounding, which could hide an error."""
    return _of_row(case, replace(arithmetic, output=theory.FORMATS["float32"]))


def _of_row(case: Case, arithmetic: theory.Arithmetic) -> np.ndarray:
    scores, size = (x.numpy() for x in case.scores())
    value = case.v.numpy()[..., None, :, :]
    return theory.forward_error_bound(scores, size, value, case.q.shape[-1], arithmetic)


def ratio(error: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """Error over bound of each component; 1e9 for an error that is not finite or whose bound is 0."""
    found = np.divide(error, bound, out=np.where(error == 0, 0.0, np.inf), where=bound > 0)
    return np.where(np.isfinite(found), found, 1e9)


def random_rows(rows: int, seed: int = 0) -> dict[str, dict[str, Tally]]:
    """Mode -> family -> tally. Each mode judges the same `rows` rows."""
    found = {f"{kind} {name}": {f: Tally() for f in FAMILIES} for name, kind in MODES}
    cases = max(1, rows // (len(FAMILIES) * ROWS_A_CASE))
    for number, family in enumerate(FAMILIES):
        for i in range(cases):
            case = make(family, seed + 1_000_003 * number + i, ROWS_A_CASE)
            for name, kind in MODES:
                judge(case, name, kind, found[f"{kind} {name}"][family])
    return found


def climbed_rows(rows: int, steps: int, starts: int) -> dict[str, Tally]:
    found = {}
    for name, kind in MODES:
        tally, dtype = Tally(), DTYPES[name]
        arithmetic = getattr(theory, kind)(dtype)

        def reached(case: Case, dtype=dtype, kind=kind, arithmetic=arithmetic) -> torch.Tensor:
            _, before = simulate(case, dtype, kind)
            error = (before - exact(case)).abs().numpy()
            return torch.from_numpy(ratio(error, before_rounding(case, arithmetic))).amax((1, 2))

        for start in range(starts):
            for case in climb(start, rows, steps, dtype, reached):
                judge(case, name, kind, tally)
        found[f"{kind} {name}"] = tally
    return found


def trained_rows(windows: int, length: int) -> dict[str, Tally]:
    found = {f"{kind} {name}": Tally() for name, kind in MODES}
    for case in minilm(windows, length):
        for name, kind in MODES:
            judge(case, name, kind, found[f"{kind} {name}"])
    return found


def merged(tallies: list[Tally]) -> Tally:
    total = Tally()
    for tally in tallies:
        total.rows += tally.rows
        total.violations += tally.violations
        total.closest = max(total.closest, tally.closest)
        total.expected += tally.expected
        total.broken += tally.broken[: MOST_BROKEN - len(total.broken)]
        for level, ratios in tally.ratios.items():
            total.ratios[level] += ratios
    return total


def main(path: str, rows: int = 200_000) -> int:
    start = perf_counter()
    random = random_rows(rows)
    print(f"random rows: {perf_counter() - start:.0f} s", flush=True)
    climbed = climbed_rows(rows=64, steps=max(20, rows // 2_000), starts=4)
    print(f"hill-climbed rows: {perf_counter() - start:.0f} s", flush=True)
    trained = trained_rows(windows=2, length=128)
    print(f"trained rows: {perf_counter() - start:.0f} s", flush=True)
    modes = {}
    for mode, families in random.items():
        modes[mode] = {
            "random": merged(list(families.values())).to_dict(),
            "climbed": climbed[mode].to_dict(),
            "trained": trained[mode].to_dict(),
            "families": {name: tally.to_dict() for name, tally in families.items()},
        }
        print(mode, {k: v for k, v in modes[mode].items() if k != "families"}, flush=True)
    bits = bits_rows(cases=max(20, rows // 100))
    heads, climbed = (
        bits_heads(cases=max(11, rows // 606)),
        climbed_bits(rows=64, steps=max(20, rows // 2_000)),
    )
    print(json.dumps({"rows": bits, "heads": heads, "climbed": climbed}, indent=1))
    document = {"machine": machine(), "seed": 0, "soundness": modes, "bits": bits}
    document |= {"bits_of_heads": heads, "climbed_bits": climbed}
    document["seconds"] = round(perf_counter() - start)
    Path(path).write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    broken = sum(m[part]["violations"] for m in modes.values() for part in ("random", "climbed", "trained"))
    short = sum(found["under_predictions"] for found in (*bits.values(), *heads.values(), climbed))
    print(f"{broken} bounds broken, {short} under-predictions, {document['seconds']} s")
    return int(broken + short > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], *map(int, sys.argv[2:])))
