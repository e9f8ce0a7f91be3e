"""For which shapes cuDNN's backward of attention is wrong if a query's scores are low, on a GPU.

    python bench/cudnn_low_lse.py [--rule] [--out OUT.json] [--seconds 400]

cuDNN recomputes a weight as exp(score - lse). For keys that its last tile has too many the score is 0, and the weight
exp(-lse) overflows fp32 for an lse below -88.7. Every score lies near one value, with noise of deviation 1, so that the
softmax is not trivial. --rule tries many lengths with scores of -122 (150 s, nearly all of it to make cuDNN's plans).
Without it follow times, what cuDNN says to very small and large sizes, and a sweep over lse whose gradients are judged
against fp64: numbers that are not finite, and the error beside FlashAttention's. It stops after --seconds and says what
it left out.
"""

import argparse
import itertools
import json
import math
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch
import triton
from machine import machine
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hnf_attention import attention
from hnf_attention.engine import engines, library
from hnf_attention.engine.call import BackwardInputs, Call, check
from hnf_attention.reference import attention as reference

LSE = (0.0, -80.0, -89.0, -122.0, -1e4)
KEYS = (64, 97, 128, 192, 1216, 1280)
BATCH, HEADS = 2, 3
Gradients = tuple[Tensor, Tensor, Tensor]


def problem(queries: int, keys: int, head_dim: int, dtype: torch.dtype, causal: bool, lse: float, **sizes):
    """(q, k, v, d_out) whose rows have about this lse; under a causal mask the first row has the lowest one."""
    generator = torch.Generator("cuda").manual_seed(0)
    batch, heads = sizes.get("batch", BATCH), sizes.get("heads", HEADS)

    def draw(length):
        return torch.randn(batch, heads, length, head_dim, device="cuda", generator=generator)

    q, k, v, d_out = draw(queries), draw(keys), draw(keys), draw(queries)
    score = lse if causal or lse == 0 else lse - math.log(keys) - 0.5
    # One coordinate adds the same number to every score.
    size = math.sqrt(abs(score) * head_dim**0.5)
    q[..., 0], k[..., 0] = size, math.copysign(size, score)
    return [x.to(dtype) for x in (q, k, v, d_out)]


def options_of(q, k, v, causal, mask=None):
    return check(
        q, k, v, attn_mask=mask, is_causal=causal, scale=None, window_size=None, softcap=None, sinks=None
    )


def exact(q, k, v, d_out, causal) -> Gradients:
    q, k, v, d_out = (x.double() for x in (q, k, v, d_out))
    options = options_of(q, k, v, causal)
    out, rows = reference.attention(q, k, v, options)
    return reference.backward(q, k, v, options, out, rows.lse, rows.entropy, d_out, None, None)[:3]


def paired(q, k, v, d_out, causal) -> tuple[Call, BackwardInputs]:
    out, rows = attention(q, k, v, is_causal=causal)
    return Call(q, k, v, options_of(q, k, v, causal)), BackwardInputs(
        out, rows.lse, rows.entropy, d_out, None, None
    )


def of_sdpa(backend: SDPBackend) -> Callable[..., Gradients]:
    def run(q, k, v, d_out, causal):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(*leaves, is_causal=causal)
        return torch.autograd.grad(out, leaves, d_out)

    return run


def of_attention(q, k, v, d_out, causal) -> Gradients:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(attention(*leaves, is_causal=causal)[0], leaves, d_out)


ENGINES: dict[str, Callable[..., Gradients]] = {
    "SDPA flash": of_sdpa(SDPBackend.FLASH_ATTENTION),
    "paired cuDNN": lambda *args: library.cudnn_backward(*paired(*args))[:3],
    "paired flash": lambda *args: library.flash_backward(*paired(*args))[:3],
    "ours": lambda *args: engines._triton_backward(*paired(*args), False)[:3],
    "attention()": of_attention,
    "SDPA cuDNN": of_sdpa(SDPBackend.CUDNN_ATTENTION),
}


def judged(run: Callable[..., Gradients], arguments, true: Gradients) -> dict:
    """Numbers that are not finite, the largest relative error of dq, dk and dv, and the heads that are not finite."""
    try:
        found = run(*arguments)
    except (RuntimeError, ValueError) as trouble:
        return {"refused": str(trouble).splitlines()[0][:120]}
    bad = sum((~x.isfinite()).sum((2, 3)) for x in found)
    errors = []
    # The first coordinate of dq and dk is a sum that cancels, of rounded numbers times a large one.
    for begin in (1, 0):
        parts = [(x.double()[..., begin:], y[..., begin:]) for x, y in zip(found, true)]
        each = [float((x - y).norm() / y.norm()) for x, y in parts]
        errors.append(max(each) if all(map(math.isfinite, each)) else math.nan)
    heads = bad.flatten().gt(0).int().tolist()
    return {"nonfinite": int(bad.sum()), "heads": heads, "error": errors[0], "error_of_all": errors[1]}


def cases():
    """(queries, keys, head_dim, dtype, causal), those that say most first."""
    for dtype, head_dim in itertools.product((torch.bfloat16, torch.float16), (64, 128)):
        for keys in KEYS:
            for queries in dict.fromkeys((keys, 1, 64, 97, 128)):
                yield queries, keys, head_dim, dtype, False
            yield keys, keys, head_dim, dtype, True


def sweep(until: float) -> tuple[list[dict], int]:
    records, left_out = [], 0
    for case in cases():
        for lse in LSE:
            if time.monotonic() > until:
                left_out += 1
                continue
            queries, keys, head_dim, dtype, causal = case
            arguments = (*problem(*case, lse), causal)
            true = exact(*arguments)
            record = {"queries": queries, "keys": keys, "head_dim": head_dim, "causal": causal, "lse": lse}
            record["dtype"] = str(dtype).removeprefix("torch.")
            record["engines"] = {name: judged(run, arguments, true) for name, run in ENGINES.items()}
            records.append(record)
    return records, left_out


def wrong(record: dict, name: str) -> str | None:
    found, flash = record["engines"][name], record["engines"]["SDPA flash"]
    if "refused" in found:
        return "refused"
    if found["nonfinite"]:
        return "NaN"
    return "error" if not found["error"] <= 2 * flash.get("error", math.inf) + 1e-3 else None


def largest_ratio(records: list[dict], name: str, key: str) -> float:
    pairs = [(r["engines"][name].get(key), r["engines"]["SDPA flash"].get(key)) for r in records]
    return max((x / y for x, y in pairs if x and y and x == x), default=math.nan)


def print_sweep(records: list[dict]) -> None:
    for name in ENGINES:
        groups = defaultdict(list)
        for record in records:
            how = wrong(record, name)
            if how is not None:
                lse = f"{record['lse']:g}"
                causal = "c" if record["causal"] else ""
                groups[how, record["dtype"], record["head_dim"], lse].append(
                    f"{record['queries']}x{record['keys']}{causal}"
                )
        print(
            f"{name}: {sum(map(len, groups.values()))} of {len(records)} wrong; largest error beside flash's: ",
            end="",
        )
        print(
            ", ".join(f"{key} {largest_ratio(records, name, key):.2f}" for key in ("error", "error_of_all"))
        )
        for (how, dtype, head_dim, lse), shapes in groups.items():
            print(f"    {how} {dtype} D={head_dim} lse={lse}: {' '.join(shapes)}")


LENGTHS = (
    2,
    8,
    16,
    31,
    32,
    33,
    48,
    63,
    64,
    65,
    72,
    80,
    96,
    104,
    112,
    127,
    128,
    129,
    136,
    160,
    184,
    191,
    192,
    193,
)
LENGTHS += (200, 224, 256, 320, 328, 384, 448, 512, 576, 640, 1000, 1024, 1088, 1096, 4096, 4160)
FEW_LENGTHS = (64, 97, 128, 160, 192, 256, 1216)
SIZES = ((1, 1), (1, 2), (4, 1), (2, 16))


def rule() -> list[dict]:
    """Which shapes give numbers that are not finite for scores of -122: many lengths, few of all else."""
    bf16, fp16 = torch.bfloat16, torch.float16
    cases = [(n, n, 64, bf16, False, 2, 3, 3) for n in LENGTHS]
    cases += [(m, n, 64, bf16, False, b, h, h) for b, h in SIZES for n in (128, 192, 200) for m in (1, 64)]
    cases += [(m, n, 64, bf16, False, 1, 1, 1) for m in (1, 2, 63, 64, 65) for n in (128, 256)]
    cases += [(n, n, 64, bf16, True, 2, 3, 3) for n in (32, 63, 64, 65, 96, 128, 160, 192, 320, 576, 1088)]
    cases += [
        (n, n, d, bf16, False, 2, 4, kv)
        for d, kv in ((128, 4), (128, 2), (32, 4), (96, 4))
        for n in FEW_LENGTHS
    ]
    cases += [(n, n, 128, bf16, True, 2, 4, 2) for n in FEW_LENGTHS]
    cases += [(n, n, 64, fp16, causal, 2, 3, 3) for causal in (False, True) for n in FEW_LENGTHS]
    return [ruled(*case) for case in cases]


def ruled(m, n, head_dim, dtype, causal, batch, heads, kv_heads) -> dict:
    """cuDNN's gradients beside ours, of scores with noise and of scores that are all the same."""
    record = {"queries": m, "keys": n, "head_dim": head_dim, "dtype": str(dtype)[6:], "causal": causal}
    record |= {"batch": batch, "heads": heads, "kv_heads": kv_heads}
    q, k, v, d_out = problem(m, n, head_dim, dtype, causal, -122.0, batch=batch, heads=heads)
    k, v = k[:, :kv_heads], v[:, :kv_heads]
    size = math.sqrt(122 * head_dim**-0.5)
    call = paired(q, k, v, d_out, causal)
    same = paired(torch.full_like(q, size), torch.full_like(k, -size), v, d_out, causal)
    try:
        found, of_same = library.cudnn_backward(*call)[:3], library.cudnn_backward(*same)[:3]
    except (RuntimeError, ValueError) as trouble:
        return record | {"said": str(trouble).splitlines()[0][:120]}
    ours = engines._triton_backward(*call, False)[:3]
    difference = max(
        float((x.double() - y)[..., 1:].norm() / y[..., 1:].norm())
        for x, y in zip(found, (y.double() for y in ours))
    )
    faults = {
        "NaN": not all(x.isfinite().all() for x in found),
        "NaN of equal scores": not all(x.isfinite().all() for x in of_same),
    }
    said = [name for name, wrong in faults.items() if wrong]
    if not said and not difference < 2e-2:
        said = [f"differs by {difference:.1e}"]
    return record | {"said": ", ".join(said) or "right"}


def print_rule(records: list[dict]) -> None:
    groups: dict = defaultdict(lambda: defaultdict(list))
    for r in records:
        kind = tuple(r[name] for name in ("head_dim", "dtype", "causal", "batch", "heads", "kv_heads"))
        groups[kind][r["said"]].append(f"{r['queries']}x{r['keys']}")
    for kind, said in groups.items():
        print("D, dtype, causal, B, H, H_kv:", *kind)
        for text, shapes in said.items():
            print(f"    {text}: {' '.join(shapes)}")


def limits() -> dict[str, str]:
    """What cuDNN's backward says to small and to large sizes."""
    found = {}
    shapes = [
        (1, 2, m, n, d)
        for m, n in ((1, 1), (1, 2), (2, 1), (2, 2), (64, 1), (1, 64), (3, 3))
        for d in (8, 64)
    ]
    shapes += [(65535, 1, 2, 2, 8), (65536, 1, 2, 2, 8), (1, 65536, 2, 2, 8), (32768, 4, 2, 2, 8)]
    for batch, heads, m, n, d in shapes:
        arguments = (*problem(m, n, d, torch.bfloat16, False, 0.0, batch=batch, heads=heads), False)
        for name in ("paired cuDNN", "paired flash", "ours", "SDPA cuDNN"):
            try:
                result = judged(ENGINES[name], arguments, exact(*arguments))
                said = (
                    result.get("refused") or f"{result['nonfinite']} non-finite, error {result['error']:.1e}"
                )
            except Exception as trouble:
                said = f"{type(trouble).__name__}: {str(trouble)[:100]}"
            found[f"{batch}x{heads}x{m}x{n}x{d} {name}"] = said
    return found


def run_cudnn(call: Call, inputs: BackwardInputs, bias: Tensor | None, lse: Tensor) -> Gradients:
    nothing = torch.zeros((), dtype=torch.int64, device="cuda")
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        inputs.d_out, *call[:3], inputs.out, lse[..., None], nothing, nothing, bias, None, None,
        call.query.shape[2], call.key.shape[2], 0.0, call.options.is_causal, scale=call.options.scale,
    )  # fmt: skip


def timed(action: Callable[[], object]) -> float | str:
    try:
        return triton.testing.do_bench(action, warmup=10, rep=60, return_mode="median")
    except (RuntimeError, ValueError) as trouble:
        return str(trouble).splitlines()[0][:60]


def times() -> list[dict]:
    """Milliseconds of backwards."""
    shapes = ((4, 16, 4096, 128), (16, 12, 1024, 64), (4, 12, 1000, 64))
    return [times_of(*shape, causal) for shape in shapes for causal in (False, True)]


def times_of(batch: int, heads: int, length: int, head_dim: int, causal: bool) -> dict:
    drawn = problem(length, length, head_dim, torch.bfloat16, causal, 0.0, batch=batch, heads=heads)
    call, inputs = paired(*drawn, causal)
    row: dict = {"shape": [batch, heads, length, head_dim], "causal": causal}
    row["cuDNN"] = timed(lambda: library.cudnn_backward(call, inputs))
    row["flash"] = timed(lambda: library.flash_backward(call, inputs))
    row["ours"] = timed(lambda: engines._triton_backward(call, inputs, False))
    row["lse.amin"] = timed(lambda: inputs.lse.amin(-1))
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--rule", action="store_true", help="only find out which shapes are wrong")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # PyTorch's, of the kernels it does not use
    begin = time.monotonic()
    document: dict = {"machine": machine()}
    document["rule"] = rule()
    print_rule(document["rule"])
    print(f"{time.monotonic() - begin:.0f} s", flush=True)
    if not arguments.rule:
        document |= {"times": times(), "limits": limits()}
        for row in (*document["times"], *document["limits"].items()):
            print("   ", row, flush=True)
        document["sweep"], document["left_out"] = sweep(begin + arguments.seconds)
        print_sweep(document["sweep"])
        print(f"{document['left_out']} cases left out")
    if arguments.out:
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{time.monotonic() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
