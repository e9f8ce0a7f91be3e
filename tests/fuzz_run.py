"""Runs fuzzed cases: makes each from its number, computes it in poisoned memory, judges it beside fp64."""

from __future__ import annotations

import os
import queue
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path
from unittest import mock

import torch
from fuzz_cases import SMALL_WIDTHS, FuzzCase, draw_case, on_device
from fuzz_gradients import GradientOracle
from fuzz_oracle import Expected, Oracle
from interpreter import patch_language_once
from poison import poisoned_memory
from torch import Tensor

from hnf_attention import attention, attention_stats
from hnf_attention.engine import engines
from hnf_attention.engine.card import NVIDIA, Card
from hnf_attention.reference import sampling

INTERPRETED = (torch.float16, torch.float32)  # Triton's interpreter multiplies no bf16
ON_CARD = (torch.float16, torch.bfloat16, torch.bfloat16, torch.float32)
CORE = ("lse", "entropy", "max_logit", "min_logit")
MORE = ("logit_var", "collision", "score_std", "sink_mass", "score_mean", "log_denominator", "visible_keys")
GRACE, AT_A_TIME = 30, 20  # seconds for the last case, compilation included; cases of one report


@dataclass(frozen=True)
class Run:
    """How cases are made and where they run."""

    device: str = "cpu"
    engine: str = "reference"  # "reference", or "kernels": those of the card, or interpreted ones
    kinds: int | None = None
    largest: int = 65

    def case(self, number: int) -> FuzzCase:
        if self.device == "cuda":
            return draw_case(number, self.kinds, self.largest, ON_CARD)
        if self.engine == "kernels":
            return draw_case(number, self.kinds, self.largest, INTERPRETED, SMALL_WIDTHS)
        return draw_case(number, self.kinds, self.largest)

    def replay(self, number: int) -> str:
        options = "" if self.kinds is None else f" --kinds {self.kinds}"
        return (
            f"python tests/fuzz.py --seed {number} --device {self.device} --engine {self.engine} "
            f"--largest {self.largest}{options}"
        )


@contextmanager
def interpreted_kernels(number: int) -> Iterator[None]:
    """Calls on the CPU go to the portable kernels, with tiles that depend on the number of the case."""
    from hnf_attention.kernels.portable import backward, forward, probe
    from hnf_attention.kernels.shared.tiles import BackwardTiles, Tiles

    def tiles(part: int) -> Tiles:
        return Tiles((16, 32, 64)[number // 3**part % 3], (16, 16, 32)[number // 3 ** (part + 1) % 3], 4, 1)

    card = Card("interpreter", NVIDIA, (8, 0), triton="3.9.0")
    with ExitStack() as patches:
        for place, name, value in (
            (engines, "card_of", lambda device: card),
            (engines, "on_device", lambda query: nullcontext()),
            (forward, "forward_tiles", lambda *a, **k: tiles(0)),
            (probe, "probe_tiles", lambda *a, **k: tiles(0)),
            (backward, "backward_tiles", lambda *a, **k: BackwardTiles(tiles(1), tiles(2))),
        ):
            patches.enter_context(mock.patch.object(place, name, value))
        yield


def computed(case: FuzzCase, device: str) -> dict[str, Tensor]:
    """What the public functions give for a case: results, statistics and gradients by name, on the CPU."""
    problem = case.problem
    names = ("query", "key", "value", "sinks", "mask")
    leaves = {name: on_device(getattr(case, name), device) for name in names}
    learned = []
    for name in problem.learned:
        x = leaves[name]
        if x is not None and x.dtype != torch.bool and not (name == "value" and problem.entry != "attention"):
            leaves[name] = x.detach().requires_grad_()
            learned.append(name)
    query, key, value, sinks, mask = (leaves[name] for name in names)
    keywords = {
        "attn_mask": mask,
        "is_causal": case.is_causal,
        "scale": case.scale,
        "window_size": case.window_size,
        "softcap": case.softcap,
        "sinks": sinks,
        "seqlens": None
        if case.seqlens is None
        else torch.tensor(case.seqlens, dtype=torch.int32, device=device),
        "extended": problem.extended,
    }
    found: dict[str, Tensor] = {}
    if problem.entry == "attention":
        found["out"], rows = attention(query, key, value, **keywords)
    elif problem.entry == "statistics":
        rows = attention_stats(query, key, **keywords)
    else:
        rows = attention_stats(query, key, sample=case.sample, **keywords)
        found["row_index"] = rows.row_index
    found |= {name: getattr(rows, name) for name in (*CORE, *(MORE if problem.extended else ()))}
    if problem.cotangents and learned:
        results = [found[name] for name in problem.cotangents]
        given = [
            getattr(case, f"d_{name}").to(device, x.dtype) for name, x in zip(problem.cotangents, results)
        ]
        inputs = [leaves[name] for name in learned]
        if any(x.requires_grad for x in results):
            gradients = torch.autograd.grad(results, inputs, given, allow_unused=True)
            found |= {
                f"d_{n}": torch.zeros_like(x) if g is None else g
                for n, x, g in zip(learned, inputs, gradients)
            }
    return {name: x.detach().cpu() for name, x in found.items()}


@dataclass
class Judged:
    """What is wrong with a case, and how close to its bounds it came."""

    faults: list[str] = field(default_factory=list)
    ratio: float = 0.0  # the largest error beside its bound

    def compare(self, name: str, got: Tensor, expected: Expected) -> None:
        """Note the numbers that are further from the truth than rounding explains."""
        truth, judged = expected.truth, expected.judged.expand(expected.truth.shape)
        if got.shape != truth.shape:
            self.faults.append(f"{name} has shape {tuple(got.shape)}, expected {tuple(truth.shape)}")
            return
        largest = torch.finfo(got.dtype).max if got.dtype.is_floating_point else torch.inf
        infinite = truth.isinf()
        vague = ~infinite & ~(truth.abs() + expected.bound < largest)
        wrong = judged & ((infinite & (got != truth)) | got.isnan())
        error = torch.where(judged & ~infinite & ~vague, (got.double() - truth).abs(), 0.0)
        wrong |= ~(error <= expected.bound.nan_to_num(posinf=1e300)) & judged & ~infinite & ~vague
        if bool(wrong.any()):
            place = tuple(wrong.nonzero()[0].tolist())
            self.faults.append(
                f"{name}: {int(wrong.sum())} of {int(judged.sum())} numbers are wrong, first at {place}: "
                f"{float(got[place]):.9g}, expected {float(truth[place]):.9g} +- {float(expected.bound[place]):.2g}"
            )
        elif error.numel():
            self.ratio = max(self.ratio, float((error / expected.bound.clamp(min=1e-300)).max()))


def _sampled(expected: Expected, index: Tensor, blank: float) -> Expected:
    """The expected numbers of the rows `index` (B, H, M_s), those of an empty row where it is -1."""
    place, known = index.clamp(min=0), index >= 0
    parts = (expected.truth, expected.bound, expected.judged.expand(expected.truth.shape))
    truth, bound, judged = (x.gather(2, place) for x in parts)
    return Expected(
        torch.where(known, truth, blank), torch.where(known, bound, 0.0), torch.where(known, judged, True)
    )


def judge(case: FuzzCase, found: dict[str, Tensor], ties: bool) -> Judged:
    """The results of a case beside the truth; ties: see `Oracle`."""
    oracle, judged = Oracle(case, ties), Judged()
    broken, index = oracle.broken, found.get("row_index")
    if index is not None:
        batch, heads, queries = case.query.shape[:3]
        period = sampling.effective_period(case.sample[0], queries)
        wanted = sampling.row_index(
            batch, heads, queries, period, case.sample[1] % period, torch.device("cpu")
        )
        if not torch.equal(index, wanted):
            judged.faults.append("row_index differs from the specification")
            return judged
        broken = broken.gather(2, index.clamp(min=0)) & (index >= 0)
    blank = {"lse": -torch.inf, "max_logit": -torch.inf, "min_logit": torch.inf}
    for name, expected in oracle.rows(case.problem.extended).items():
        got = found[name]
        if index is not None:
            expected = _sampled(expected, index, blank.get(name, 0.0))
        judged.compare(name, got, expected)
        if name != "visible_keys" and got.shape == broken.shape and not bool(got[broken].isnan().all()):
            judged.faults.append(f"{name} is not NaN in a row that NaN or inf reached")
    if "out" in found:
        judged.compare("out", found["out"], oracle.out())
    if any(name in found for name in ("d_query", "d_key", "d_value", "d_sinks", "d_mask")):
        for name, expected in GradientOracle(oracle).expected().items():
            judged.compare(f"d_{name}", found[f"d_{name}"], expected)
    return judged


def run_case(case: FuzzCase, run: Run) -> Judged:
    """Compute a case in poisoned memory and judge it."""
    interpreted = run.engine == "kernels" and run.device == "cpu"
    try:
        with interpreted_kernels(case.number) if interpreted else nullcontext(), poisoned_memory() as made:
            found = computed(case, run.device)
    except Exception as error:
        return Judged([f"{type(error).__name__}: {error}"])
    judged = judge(case, found, run.device == "cuda")  # the interpreter's products are a library's
    judged.faults += made.overrun()
    return judged


def sweep(
    numbers: Sequence[int], run: Run, until: float | None = None, note: Callable[[int], object] = id
) -> dict:
    """What came of the cases of these numbers: how many ran, which failed, the largest ratio to a bound.

    until: a time; no case starts after it. note: called with each number before its case runs.
    """
    ran, failed, ratio = 0, [], 0.0
    for number in numbers:
        if until is not None and time.time() > until:
            break
        note(number)
        case = run.case(number)
        judged = run_case(case, run)
        ran, ratio = ran + 1, max(ratio, judged.ratio)
        if judged.faults:
            failed.append(
                {"seed": number, "case": str(case), "faults": judged.faults, "replay": run.replay(number)}
            )
    return {"ran": ran, "failed": failed, "ratio": ratio}


def _worker(numbers: Sequence[int], run: Run, until: float | None, place: str, found: Queue) -> None:
    """`sweep` some numbers in this process, a few at a time; their results go to the queue."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".* encountered", RuntimeWarning)  # NumPy's, of the interpreter
    if run.engine == "kernels" and run.device == "cpu":
        patch_language_once()
    with open(place, "wb", buffering=0) as file:
        for start in range(0, len(numbers), AT_A_TIME):
            part = numbers[start : start + AT_A_TIME]
            found.put(sweep(part, run, until, lambda number: os.pwrite(file.fileno(), b"%012d" % number, 0)))


def over_processes(numbers: Sequence[int], run: Run, until: float | None, processes: int) -> dict:
    """`sweep`, spread over processes: those of one kind of problem go to one, which then compiles it alone.

    A process that ends by itself, or that runs its case for GRACE seconds after the time, is a failure of that case.
    """
    total: dict = {"ran": 0, "failed": [], "ratio": 0.0}
    context = get_context("spawn")
    found = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder, str(process)) for process in range(processes)]
        workers = [
            context.Process(
                target=_worker, args=(numbers[p::processes], run, until, place, found), daemon=True
            )
            for p, place in enumerate(places)
        ]
        for worker in workers:
            worker.start()
        end = float("inf") if until is None else until + GRACE
        while True:
            alive = any(
                worker.is_alive() for worker in workers
            )  # asked before the queue is found to be empty
            try:
                done = found.get(timeout=1.0)
            except queue.Empty:
                if not alive or time.time() > end:
                    break
                continue
            total["ran"] += done["ran"]
            total["failed"] += done["failed"]
            total["ratio"] = max(total["ratio"], done["ratio"])
        for worker, place in zip(workers, places):
            if worker.is_alive() or worker.exitcode:
                last = int(place.read_text()) if place.exists() else -1
                what = "did not end in time" if worker.is_alive() else f"ended with code {worker.exitcode}"
                failure = {"seed": last, "case": f"seed {last}", "faults": [f"a process {what}"]}
                total["failed"].append(failure | {"replay": run.replay(last)})
                worker.kill()
    return total
