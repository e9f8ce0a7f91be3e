"""Attention with its statistics over very long sequences: time, memory, and rows checked against fp64.

    python bench/long_sequences.py OUT.json [--lengths 131072 1048576] [--heads 8]
    python bench/long_sequences.py OUT.json --dry       # short sequences on a CPU: does it run

One causal sequence in bf16, D = 128. Work: 4 * H * N * N * D / 2 floating-point operations in the forward (2.3e15
for a million tokens and 8 heads), half of that in a probe, 3.5 times that with the backward. `extra_bytes` is the
peak of memory beyond inputs and results (q, k, v; out and four statistics, or the gradients). It may grow no faster
than N, so `extra_bytes_a_row` is the same at every length.

64 rows of every head are checked: the first, the last, those on either side of tile borders, and others spread over
the sequence. Errors of statistics are relative to the largest true value, or absolute if that is below 1, and at most
5e-5. The output's error is at most twice SDPA's in the same rows, plus one rounding. Exit code 1 if one is larger.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch
from machine import machine
from timing import Spent, matmul_tflops, spent
from torch.nn.functional import scaled_dot_product_attention

from hnf_attention import attention, attention_stats
from hnf_attention.reference import sampling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("lse", "entropy", "max_logit", "min_logit")
TOLERANCE = 5e-5  # bench/probe.py's
CHECKED_ROWS, ROWS_AT_ONCE = 64, 16
PERIOD = 16
BACKWARD_UP_TO = 131072  # a backward over a million tokens takes ten seconds and shows nothing new


def sampled_rows(length: int) -> list[int]:
    borders = [x + y for x in (64, 128, length // 2, length - 128) for y in (-1, 0)]
    fixed = sorted({0, 1, length - 1, *borders} & set(range(length)))
    spread = torch.linspace(2, length - 2, CHECKED_ROWS - len(fixed)).long().tolist()
    return sorted({*fixed, *spread})


def exact(q, k, v, rows: list[int]) -> dict[str, torch.Tensor]:
    """fp64 output (H, R, D) and statistics (H, R) of these rows, a few rows of one head at a time."""
    found = {name: [] for name in ("out", *NAMES)}
    columns = torch.arange(k.shape[2], device=k.device)
    index = torch.tensor(rows, device=q.device)
    for head in range(q.shape[1]):
        keys, values = k[0, head].double(), v[0, head].double()
        for part in index.split(ROWS_AT_ONCE):
            scores = q[0, head, part].double() @ keys.T * q.shape[3] ** -0.5
            hidden = columns > part[:, None]
            low = scores.masked_fill(hidden, torch.inf).amin(1)
            scores.masked_fill_(hidden, -torch.inf)
            weights = scores.softmax(1)
            entropy = torch.special.entr(weights).sum(1)
            results = (weights @ values, scores.logsumexp(1), entropy, scores.amax(1), low)
            for name, result in zip(found, results, strict=True):
                found[name].append(result)
    shape = (q.shape[1], len(rows))
    return {name: torch.cat(parts).unflatten(0, shape) for name, parts in found.items()}


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference over the largest true value, or over 1 if that is larger; infinite for NaN."""
    off = float((got.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1))
    return off if off == off else float("inf")


def of_norm(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest error of a row, relative to the row's length."""
    return float(((got.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


def nbytes(*tensors: torch.Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def summary(time: Spent, results: int, flop: float, rows: int) -> dict:
    found = {"ms": time.device * 1e3, "tflops": flop / time.device / 1e12}
    if time.peak is not None:
        extra = time.peak - time.before - results
        found |= {"peak_bytes": time.peak, "extra_bytes": extra, "extra_bytes_a_row": extra / rows}
    return found


def twice(action) -> Spent:
    """The cost of the second run; the first one compiles."""
    action()
    return spent(action)


def measure(length: int, heads: int, head_dim: int) -> dict:
    torch.manual_seed(0)
    shape = (1, heads, length, head_dim)
    q, k, v = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    flop, rows = 4.0 * heads * length**2 * head_dim / 2, heads * length
    index = sampled_rows(length)
    wanted = exact(q, k, v, index)
    found = {"length": length, "heads": heads, "head_dim": head_dim, "checked_rows": len(index) * heads}
    errors = found["errors"] = {}

    time = twice(lambda: scaled_dot_product_attention(q, k, v, is_causal=True))
    errors["sdpa out"] = of_norm(time.result[0, :, index], wanted["out"])
    found["sdpa"] = summary(time, nbytes(time.result), flop, rows)
    del time

    time = twice(lambda: attention(q, k, v, is_causal=True))
    out, stats = time.result
    errors["out"] = of_norm(out[0, :, index], wanted["out"])
    for name in NAMES:
        errors[name] = relative(getattr(stats, name)[0, :, index], wanted[name])
    results = nbytes(out, *(getattr(stats, name) for name in NAMES))
    found["forward"] = summary(time, results, flop, rows)
    del time, out, stats

    time = twice(lambda: attention_stats(q, k, is_causal=True))
    for name in NAMES:
        errors[f"probe {name}"] = relative(getattr(time.result, name)[0, :, index], wanted[name])
    results = nbytes(*(getattr(time.result, name) for name in NAMES))
    found["probe"] = summary(time, results, flop / 2, rows)
    del time

    time = twice(lambda: attention_stats(q, k, is_causal=True, sample=(PERIOD, 3)))
    results = nbytes(time.result.row_index, *(getattr(time.result, name) for name in NAMES))
    share = 1 / sampling.effective_period(PERIOD, length)
    found["probe 1/16"] = summary(time, results, flop / 2 * share, rows)
    del time

    if length <= BACKWARD_UP_TO:
        found["forward and backward"] = train(q, k, v, flop * 3.5, rows)
    one_rounding = torch.finfo(torch.bfloat16).eps / 2
    good = errors["out"] <= 2 * errors["sdpa out"] + one_rounding
    found["right"] = good and all(e <= TOLERANCE for name, e in errors.items() if not name.endswith("out"))
    return found


def train(q, k, v, flop: float, rows: int) -> dict:
    inputs = [x.requires_grad_() for x in (q, k, v)]
    cotangent = torch.randn_like(q)

    def step():
        return torch.autograd.grad(attention(*inputs, is_causal=True)[0], inputs, cotangent)

    time = twice(step)
    return summary(time, nbytes(*time.result), flop, rows)


def show(row: dict, ceiling: float | None) -> None:
    print(f"\n{row['length']} tokens, {row['heads']} heads of {row['head_dim']}, causal")
    for name, found in row.items():
        if isinstance(found, dict) and "ms" in found:
            share = f" ({found['tflops'] / ceiling:.0%} of the ceiling)" if ceiling else ""
            rest = f"  {found['extra_bytes_a_row']:.1f} extra bytes a row" if "extra_bytes" in found else ""
            print(f"    {name:20} {found['ms']:10.2f} ms {found['tflops']:6.0f} TFLOP/s{share}{rest}")
    errors = ", ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())
    print(f"    errors of {row['checked_rows']} rows: {errors}: {'right' if row['right'] else 'WRONG'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the JSON file to write")
    parser.add_argument("--lengths", nargs="+", type=int, help="131072 1048576 unless given")
    parser.add_argument("--heads", type=int)
    parser.add_argument("--dry", action="store_true", help="short sequences of few heads")
    arguments = parser.parse_args()
    lengths = arguments.lengths or ([200, 512] if arguments.dry else [131072, 1048576])
    heads, head_dim = arguments.heads or (2 if arguments.dry else 8), 16 if arguments.dry else 128
    ceiling = matmul_tflops()
    document = {"machine": machine() | {"matmul_tflops": ceiling}, "dry": arguments.dry, "long": []}
    for length in lengths:
        document["long"].append(measure(length, heads, head_dim))
        show(document["long"][-1], ceiling)
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    return int(not all(row["right"] for row in document["long"]))


if __name__ == "__main__":
    raise SystemExit(main())
