"""Gradients of calls under a user mask by cuDNN's backward, the mask as a bias: are they right, and how fast?

    python bench/masked_backward.py [--only correctness|low|times] [--head-dims 64 128] [--out OUT.json]

Right: against fp64, beside our own backward, over shapes, layouts and dtypes of masks; rows without a visible key among
them. Times: medians of forward and backward in milliseconds, B * N = 16k tokens, 16 heads, of SDPA, of attention() with
our own backward, and of attention() with cuDNN's, which includes making the bias of a boolean mask.
"""

import argparse
import itertools
import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch
import triton
from cudnn_low_lse import options_of, problem, run_cudnn
from machine import machine
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hnf_attention import attention
from hnf_attention.engine import engines
from hnf_attention.engine.call import BackwardInputs, Call
from hnf_attention.reference import attention as reference

TOKENS, TIMED_HEADS = 16384, 16
BATCH, HEADS = 2, 4
# What a row without a visible key has for its lse of -inf. The weights are exp(-inf - lse) = 0 with either.
HIDDEN_LSE = {"lse -inf": None, "lse 0": 0.0, "lse +inf": math.inf}


def bias_of(mask: Tensor, like: Tensor) -> Tensor:
    """The mask as cuDNN takes it: 0 or -inf in the dtype of q."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill_(~mask, -math.inf)
    return mask


def drawn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A random boolean mask that shows three quarters of all pairs, and to each query the first key."""
    mask = torch.rand(shape, device="cuda", generator=generator) < 0.75
    mask[..., 0] = True
    return mask


def masks(b: int, h: int, m: int, n: int, dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator("cuda").manual_seed(1)
    whole, of_batch = drawn((b, h, m, n), g), drawn((b, 1, m, n), g)
    shared, of_head, padding = drawn((1, 1, m, n), g), drawn((1, h, m, n), g), drawn((b, 1, 1, n), g)
    hidden_rows = of_batch.clone()
    hidden_rows[:, :, m // 2 :: 3] = False
    hidden_sequence = of_batch.clone()
    hidden_sequence[-1] = False
    normal = torch.randn(b, h, m, n, device="cuda", generator=g)
    offset = torch.zeros(b * m * n + 1, device="cuda", dtype=dtype)[1:].view(b, 1, m, n)
    wide = bias_of(drawn((b, 1, m, 2 * n), g), normal.to(dtype))[..., :n]
    return {
        "bool (B,H,M,N)": whole,
        "bool (B,1,M,N)": of_batch,
        "bool (1,1,M,N)": shared,
        "bool (1,H,M,N)": of_head,
        "bool (B,1,1,N)": padding,
        "bool (B,1,1,N) expanded": padding.expand(b, 1, m, n),
        "bool (B,1,M,1)": drawn((b, 1, m, 1), g),
        "bool (1,1,1,1)": torch.ones(1, 1, 1, 1, device="cuda", dtype=torch.bool),
        "bool causal": torch.ones(m, n, device="cuda", dtype=torch.bool).tril()[None, None],
        "bool hidden rows": hidden_rows,
        "bool hidden sequence": hidden_sequence,
        "bias (B,H,M,N)": normal.to(dtype),
        "bias (1,1,M,N)": normal[:1, :1].to(dtype),
        "bias (1,H,M,1)": normal[:1, :, :, :1].to(dtype),
        "bias fp32": normal,
        "bias offset": offset.normal_(generator=g),
        "bias transposed": normal.to(dtype).mT.contiguous().mT,
        "bias of wider rows": wide,
        "bias finfo.min": torch.zeros_like(normal).masked_fill_(~whole, torch.finfo(dtype).min).to(dtype),
        "bias hidden rows at finfo.min": torch.zeros(b, 1, m, n, device="cuda")
        .masked_fill_(~hidden_rows, torch.finfo(dtype).min)
        .to(dtype),
        "bias -120": (normal[:, :1] * 0 - 120).to(dtype),
    }


def errors(found, true) -> dict:
    bad = sum(int((~x.isfinite()).sum()) for x in found)
    # Of a gradient that is zero, the error itself.
    each = [float((x.double() - y).norm() / max(float(y.norm()), 1e-3)) for x, y in zip(found, true)]
    return {"nonfinite": bad, "error": max(each) if not bad else math.nan}


def tried(run: Callable[[], object], true) -> dict:
    try:
        return errors(run(), true)
    except Exception as trouble:  # a refusal is a result
        return {"refused": f"{type(trouble).__name__}: {str(trouble).splitlines()[0][:140]}"}


def judge(b, h, kv_heads, m, n, head_dim, dtype, name, mask, causal) -> dict:
    g = torch.Generator("cuda").manual_seed(0)

    def draw(heads, length):
        return torch.randn(b, heads, length, head_dim, device="cuda", generator=g).to(dtype)

    q, k, v, d_out = draw(h, m), draw(kv_heads, n), draw(kv_heads, n), draw(h, m)
    wide = mask if mask.dtype == torch.bool else mask.double()
    doubles = [x.double() for x in (q, k, v)]
    options = options_of(*doubles, causal, wide)
    out, rows = reference.attention(*doubles, options)
    true = reference.backward(*doubles, options, out, rows.lse, rows.entropy, d_out.double(), None, None)[:3]
    out, rows = attention(q, k, v, attn_mask=mask, is_causal=causal)
    inputs = BackwardInputs(out, rows.lse, rows.entropy, d_out, None, None)
    call = Call(q, k, v, options_of(q, k, v, causal, mask))
    record = {"shape": [b, h, kv_heads, m, n, head_dim], "mask": name, "causal": causal}
    record["dtype"] = str(dtype).removeprefix("torch.")
    record["ours"] = tried(lambda: engines._triton_backward(call, inputs, False)[:3], true)
    for how, filled in HIDDEN_LSE.items():
        lse = rows.lse if filled is None else rows.lse.masked_fill(rows.lse == -math.inf, filled)
        if filled is None or "hidden" in name:
            record[how] = tried(lambda lse=lse: run_cudnn(call, inputs, bias_of(mask, q), lse), true)
    return record


def verdict(record: dict, how: str) -> str:
    found = record[how]
    if "refused" in found:
        return "refused: " + found["refused"]
    if found["nonfinite"]:
        return f"{found['nonfinite']} non-finite"
    right = found["error"] <= 2 * record["ours"].get("error", math.inf) + 1e-3
    return (
        "right"
        if right
        else f"error {found['error']:.1e} for ours {record['ours'].get('error', math.nan):.1e}"
    )


def correctness() -> list[dict]:
    records = []
    cases = [
        (2, 4, 4, 256, 256, 64, torch.bfloat16, False),
        (2, 4, 4, 256, 256, 128, torch.float16, False),
        (2, 4, 2, 128, 384, 64, torch.bfloat16, False),
        (2, 4, 4, 200, 200, 64, torch.bfloat16, False),
        (2, 4, 4, 97, 97, 64, torch.float16, False),
        (2, 4, 4, 64, 130, 128, torch.bfloat16, False),
        (2, 4, 4, 130, 1, 64, torch.bfloat16, False),
        (2, 4, 4, 1, 130, 64, torch.bfloat16, False),
        (2, 4, 4, 256, 256, 64, torch.bfloat16, True),
    ]
    for *sizes, dtype, causal in cases:
        b, h, _, m, n, _ = sizes
        given = masks(b, h, m, n, dtype)
        if m < 8 or n < 8:
            given = {name: given[name] for name in ("bool (B,H,M,N)", "bool (1,1,M,N)", "bias (B,H,M,N)")}
        if causal:
            given = {name: given[name] for name in ("bool (B,1,M,N)", "bool hidden rows", "bias (B,H,M,N)")}
        for name, mask in given.items():
            records.append(judge(*sizes, dtype, name, mask, causal))
    return records


def print_correctness(records: list[dict]) -> None:
    for sizes in dict.fromkeys((*r["shape"], r["dtype"], r["causal"]) for r in records):
        mine = [r for r in records if (*r["shape"], r["dtype"], r["causal"]) == sizes]
        said: dict[str, list[str]] = {}
        for r in mine:
            for how in (*HIDDEN_LSE, "ours"):
                if how in r:
                    said.setdefault(verdict(r, how), []).append(
                        r["mask"] + ("" if how == "lse -inf" else f" [{how}]")
                    )
        print("B,H,H_kv,M,N,D", *sizes)
        for text, names in said.items():
            print(f"    {text}: {'; '.join(names)}")


LOW_LENGTHS = (
    (64, 64),
    (97, 97),
    (128, 128),
    (160, 160),
    (192, 192),
    (200, 200),
    (256, 256),
    (320, 320),
    (1000, 1000),
)
LOW_LENGTHS += (
    (1216, 1216),
    (2, 128),
    (64, 128),
    (64, 256),
    (2, 200),
    (64, 200),
    (2, 97),
    (300, 128),
    (300, 384),
)


def low() -> list[dict]:
    """The gradients of scores of -122 under boolean masks: cuDNN's beside ours."""
    cases = [(2, 4, 4, m, n, 64, torch.bfloat16, False) for m, n in LOW_LENGTHS]
    cases += [
        (1, 1, 1, m, n, 64, torch.float16, False) for m, n in ((2, 128), (64, 128), (2, 200), (256, 256))
    ]
    cases += [
        (2, 4, 2, n, n, 128, torch.bfloat16, causal) for causal in (False, True) for n in (64, 128, 192, 200)
    ]
    return [low_of(*case) for case in cases]


def low_of(b, h, kv_heads, m, n, head_dim, dtype, causal) -> dict:
    record = {"shape": [b, h, kv_heads, m, n, head_dim], "dtype": str(dtype)[6:], "causal": causal}
    q, k, v, d_out = problem(m, n, head_dim, dtype, causal, -122.0, batch=b, heads=h)
    k, v = k[:, :kv_heads], v[:, :kv_heads]
    all_masks = masks(b, h, m, n, dtype)
    for name in ("bool (B,H,M,N)", "bool (B,1,1,N)", "bool hidden rows"):
        mask = all_masks[name]
        out, rows = attention(q, k, v, attn_mask=mask, is_causal=causal)
        inputs = BackwardInputs(out, rows.lse, rows.entropy, d_out, None, None)
        call = Call(q, k, v, options_of(q, k, v, causal, mask))
        ours = [x.double()[..., 1:] for x in engines._triton_backward(call, inputs, False)[:3]]
        said = tried(lambda: [x[..., 1:] for x in run_cudnn(call, inputs, bias_of(mask, q), rows.lse)], ours)  # noqa: B023
        right = said.get("error", math.nan) < 2e-2
        record[name] = (
            "right" if right else said.get("refused") or f"{said['nonfinite']} non-finite {said['error']:.1e}"
        )
    return record


def milliseconds(action: Callable[[], object]) -> float:
    return triton.testing.do_bench(action, warmup=20, rep=100, return_mode="median")


def timed(head_dim: int, length: int, additive: bool) -> dict[str, float]:
    g = torch.Generator("cuda").manual_seed(0)
    shape = (TOKENS // length, TIMED_HEADS, length, head_dim)
    q, k, v, d_out = (torch.randn(shape, device="cuda", generator=g).to(torch.bfloat16) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    mask = torch.ones(shape[0], 1, length, length, dtype=torch.bool, device="cuda").tril_()
    mask[::2, :, :, 3 * length // 4 :] = False
    if additive:
        mask = bias_of(mask, q)
    options = options_of(q, k, v, False, mask)

    def sdpa():
        return torch.autograd.grad(scaled_dot_product_attention(q, k, v, attn_mask=mask), leaves, d_out)

    def ours():
        with torch.no_grad():
            out, rows = attention(q, k, v, attn_mask=mask)
            call, inputs = (
                Call(q, k, v, options),
                BackwardInputs(out, rows.lse, rows.entropy, d_out, None, None),
            )
            return engines._triton_backward(call, inputs, False)

    def paired():
        with torch.no_grad():
            out, rows = attention(q, k, v, attn_mask=mask)
            inputs = BackwardInputs(out, rows.lse, rows.entropy, d_out, None, None)
            lse = rows.lse.masked_fill(rows.lse == -math.inf, 0.0)
            return run_cudnn(Call(q, k, v, options), inputs, bias_of(mask, q), lse)

    def api():
        return torch.autograd.grad(attention(q, k, v, attn_mask=mask)[0], leaves, d_out)

    found = {"SDPA": milliseconds(sdpa), "ours": milliseconds(ours), "with cuDNN": milliseconds(paired)}
    found["attention()"] = milliseconds(api)
    found["bias"] = milliseconds(lambda: bias_of(mask, q))
    with torch.no_grad():
        found["SDPA forward"] = milliseconds(lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask))
        found["our forward"] = milliseconds(lambda: attention(q, k, v, attn_mask=mask))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=("correctness", "low", "times"))
    parser.add_argument("--head-dims", type=int, nargs="*", default=[64, 128])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # PyTorch's, of the kernels it does not use
    begin = time.monotonic()
    document: dict = {"machine": machine(), "times": []}
    if arguments.only in (None, "correctness"):
        document["correctness"] = correctness()
        print_correctness(document["correctness"])
    if arguments.only in (None, "low"):
        document["low"] = low()
        for record in document["low"]:
            print(*record.values(), flush=True)
    for head_dim, length, additive in itertools.product(arguments.head_dims, (1024, 4096), (False, True)):
        if arguments.only not in (None, "times"):
            break
        found = timed(head_dim, length, additive)
        document["times"].append({"head_dim": head_dim, "length": length, "additive": additive, **found})
        text = ", ".join(f"{name} {ms:.3f} ({ms / found['SDPA']:.2f}x)" for name, ms in found.items())
        print(f"D={head_dim} N={length} {'additive' if additive else 'bool'}: {text}", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{time.monotonic() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
