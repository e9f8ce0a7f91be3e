"""Compile every variant of every kernel for sm_90 without a card, and compare two trees.

    python bench/offline.py compile TREE OUT.json     one tree, by the Triton at hand
    python bench/offline.py compare BEFORE.json AFTER.json [MORE pairs ...] OUT.json

Of each variant: registers a thread, bytes of stack (what spills takes it), bytes of shared memory, SASS instructions
without padding, loads and stores of local memory, and a digest of the instructions in which registers and the places
of parameters are left out. TREE is a checkout of this layout or of the flat one before it.
"""

import hashlib
import importlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

TARGET = ("cuda", 90, 32)
MULTIPROCESSORS = 132  # of an H100 or H200: the Hopper forward is scheduled for so many
# Where a module lies in this layout, and where it lay in the flat one.
MODULES = {
    "engine.call": "validation",
    "statistics.heads": "stats",
    "kernels.portable.forward": "kernels.forward",
    "kernels.portable.probe": "kernels.probe",
    "kernels.portable.backward": "kernels.backward",
    "kernels.measure.fold": "kernels.fold",
    "kernels.hopper.host": "kernels.hopper",
    "kernels.shared.launch": "kernels.launch",
    "kernels.shared.packing": "kernels.packing",
}
# length, keywords of `check`, and what is drawn: a mask (kind, batch, heads), sinks, a pack.
OPTIONS = {
    "full": {},
    "causal": {"is_causal": True},
    "window": {"window_size": 70},
    "causal window": {"is_causal": True, "window_size": 70},
    "soft-cap": {"softcap": 20.0, "is_causal": True},
    "sinks": {"sinks": True, "is_causal": True},
    "negative scale": {"scale": -0.3},
    "bool mask": {"mask": "bool"},
    "additive mask": {"mask": "additive"},
    "packed": {"seqlens": (0, 10, 100, 250)},
    "packed causal window": {"seqlens": (0, 10, 100, 250), "is_causal": True, "window_size": 9},
    "everything": {
        "seqlens": (0, 10, 100, 250),
        "is_causal": True,
        "window_size": 9,
        "softcap": 20.0,
        "sinks": True,
        "mask": "additive",
    },
}
FEW = ("causal", "bool mask", "everything")


def shapes():
    """(head_dim, value_dim, dtype, length, names of options)."""
    for head_dim in (64, 128):
        yield head_dim, head_dim, "bfloat16", 256, tuple(OPTIONS)
    yield 64, 64, "bfloat16", 333, FEW
    yield 128, 128, "bfloat16", 333, ("bool mask", "additive mask")
    yield 80, 80, "bfloat16", 256, FEW
    yield 256, 256, "bfloat16", 256, FEW
    yield 128, 64, "float16", 256, FEW
    yield 64, 64, "float32", 256, FEW
    yield 128, 128, "float32", 256, ("causal",)
    yield 64, 64, "bfloat16", 1, ("full",)


def compile_tree(tree: Path) -> dict:
    """Variants by name, of the package in `tree`."""
    sys.path.insert(0, str(tree))
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Card(mock.MagicMock):
        """What Triton asks of a driver before it compiles."""

        def get_current_target(self):
            return GPUTarget(*TARGET)

        def get_current_device(self):
            return 0

    class Forgets(dict):
        """What was compiled must not be launched."""

        def __setitem__(self, key, value):
            pass

    found, seen, run = {}, {}, JITFunction.run
    label = [""]

    def compile_only(kernel, *arguments, grid, warmup, **keywords):
        compiled = run(kernel, *arguments, grid=grid, warmup=True, **keywords)
        name = f"{label[0]}: {kernel.fn.__name__.strip('_')}"
        if compiled.hash not in seen:
            seen[compiled.hash] = usage(compiled, triton)
        assert found.setdefault(name, seen[compiled.hash]) is seen[compiled.hash], name
        return compiled

    driver.set_active(Card())
    card = SimpleNamespace(multi_processor_count=MULTIPROCESSORS)
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(module("kernels.shared.launch"), "_compiled", Forgets()),
        mock.patch.object(torch.cuda, "get_device_properties", lambda device: card),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False),
    ):
        for call, action in calls(torch):
            label[0] = call
            action()
            print(f"{len(found):4} {call}", file=sys.stderr, flush=True)
    return {"triton": triton.__version__, "torch": torch.__version__, "variants": found}


def halves(host, causal: bool) -> dict:
    """What a plan of the tree is told about halves of tiles, if it knows them."""
    known = "halves" in inspect.signature(host.plan).parameters
    return {"halves": (causal, False)} if known else {}


def is_flat() -> bool:
    """Whether the tree that is compiled has the flat layout."""
    return not (Path(sys.path[0]) / "kernels" / "portable").is_dir()


def module(name: str):
    """A module of the tree that is compiled, whichever layout it has."""
    found = importlib.import_module(f"hnf_attention.{MODULES[name] if is_flat() else name}")
    assert Path(found.__file__).resolve().is_relative_to(Path(sys.path[0]).resolve()), found.__file__
    return found


def calls(torch):
    """(name, function that launches the kernels of that name)."""
    for head_dim, value_dim, dtype, length, names in shapes():
        for name in names:
            label = f"{name}, D={head_dim} D_v={value_dim} {dtype} N={length}"
            call = arguments(torch, head_dim, value_dim, dtype, length, **OPTIONS[name])
            for action, function in portable(torch, *call):
                yield f"{action}, {label}", function
    host = module("kernels.hopper.host")
    for head_dim, value_dim in ((64, 64), (128, 128), (80, 80), (64, 128)):
        for causal in (False, True):
            for length in (256, 333):
                q, k, v, options = arguments(torch, head_dim, value_dim, "bfloat16", length, is_causal=causal)
                label = f"D={head_dim} D_v={value_dim} N={length} {'causal' if causal else 'full'}"
                yield f"hopper, {label}", lambda q=q, k=k, v=v, o=options: host.forward(q, k, v, o)
                if head_dim == value_dim != 80:
                    plan = host.plan(
                        head_dim, value_dim, causal, length % 128 > 0, False, **halves(host, causal)
                    )
                    yield (
                        f"hopper without statistics, {label}",
                        lambda q=q, k=k, v=v, o=options, p=plan: host.forward(q, k, v, o, p),
                    )
    packing = module("kernels.shared.packing")
    for dtype in (torch.int32, torch.int64):
        edges = torch.tensor([0, 10, 100, 250], dtype=dtype)
        yield f"packing, {dtype}", lambda edges=edges: packing.sequence_bounds(edges, 256)


def arguments(torch, head_dim, value_dim, dtype, length, mask=None, sinks=False, seqlens=None, **keywords):
    batch, heads, kv_heads = (2, 4, 2) if seqlens is None else (1, 4, 2)
    q, k, v = (
        torch.zeros(batch, h, length, d, dtype=getattr(torch, dtype))
        for h, d in ((heads, head_dim), (kv_heads, head_dim), (kv_heads, value_dim))
    )
    if mask is not None:
        kind = torch.bool if mask == "bool" else q.dtype
        mask = torch.zeros(batch, 1, length, length, dtype=kind)
    defaults = dict.fromkeys(("scale", "window_size", "softcap")) | {"is_causal": False}
    options = module("engine.call").check(
        q,
        k,
        v,
        attn_mask=mask,
        sinks=torch.zeros(heads) if sinks else None,
        seqlens=None if seqlens is None else torch.tensor(seqlens, dtype=torch.int32),
        **defaults | keywords,
    )
    return q, k, v, options


def portable(torch, q, k, v, options):
    forward, probe, backward, fold = (
        module(f"kernels.{name}")
        for name in ("portable.forward", "portable.probe", "portable.backward", "measure.fold")
    )
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    row = torch.zeros(q.shape[:3])
    statistics = module("statistics.heads")

    def trained(d_out, d_row, value=v, **keywords):
        backward.backward(q, k, value, options, out, row, row, d_out, d_row, d_row, **keywords)

    def folded(sample):
        sampled = [row] * 4 if sample is None else probe.probe(q, k, options, sample=sample)
        index = None if sample is None else sampled[5]
        rows = statistics.RowStats(*(x.contiguous() for x in sampled[:4]), row_index=index)
        accumulator = torch.zeros(fold.SLOTS, statistics.NUM_FOLDED, q.shape[1], dtype=torch.float64)
        layout = [] if is_flat() else [module("engine.fold").kernel_layout()]
        if "context" in inspect.signature(fold.fold).parameters:
            layout.insert(0, module("reference.context").UNKNOWN)
        fold.fold(accumulator, q, k, rows, options, *layout)

    for extended in (False, True):
        suffix = " extended" if extended else ""
        yield f"forward{suffix}", lambda e=extended: forward.forward(q, k, v, options, extended=e)
        yield f"probe{suffix}", lambda e=extended: probe.probe(q, k, options, extended=e)
        yield f"sample{suffix}", lambda e=extended: probe.probe(q, k, options, extended=e, sample=(2, 1))
    yield "split", lambda: probe.probe(q, k, options, parts=2)
    yield "split sample", lambda: probe.probe(q, k, options, parts=4, sample=(2, 1))
    yield "backward of out", lambda: trained(out, None)
    yield "backward of out and rows", lambda: trained(out, row)
    yield "backward of rows", lambda: trained(None, row, None)
    if options.attn_mask is not None and options.attn_mask.dtype != torch.bool:
        yield "backward of the mask", lambda: trained(out, row, mask_gradient=True)
    yield "fold", lambda: folded(None)
    yield "fold of a sample", lambda: folded((2, 1))


def usage(compiled, triton) -> dict:
    """Registers, memory and instructions of a compiled kernel, read from its binary."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def read(*command):
            done = subprocess.run([*command, file.name], capture_output=True, text=True, check=True)
            return done.stdout

        resources = read(tools / "cuobjdump", "-res-usage")
        sass = read(tools / "nvdisasm", "-c")
    # Instructions stand at a byte of their own: /*0120*/  @P0 IMAD R1, R2, c[0x0][0x220], R3 ;
    lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+([^;]*);", sass)
    lines = [line.strip() for line in lines if not line.strip().startswith("NOP")]
    plain = [re.sub(r"c\[0x0\]\[[^]]*\]", "c", line) for line in lines]
    operations = [re.sub(r"\bU?[RP]\d+\b|`\([^)]*\)", "_", line) for line in plain]
    return {
        "registers": int(re.search(r"REG:(\d+)", resources)[1]),
        "stack": int(re.search(r"STACK:(\d+)", resources)[1]),
        "shared": compiled.metadata.shared,
        "instructions": len(lines),
        "local": sum("LDL" in line or "STL" in line for line in lines),
        "digest": hashlib.sha256("\n".join(operations).encode()).hexdigest()[:12],
    }


NUMBERS = ("registers", "stack", "shared", "instructions", "local")


def compare(before: dict, after: dict) -> dict:
    """What differs between two trees that the same Triton compiled."""
    assert before["triton"] == after["triton"]
    old, new = before["variants"], after["variants"]
    same = [name for name in old if name in new and old[name] == new[name]]
    changed = {}
    for name in old:
        if name in new and old[name] != new[name]:
            changed[name] = {key: [old[name][key], new[name][key]] for key in NUMBERS}
    ratios = [after / before for before, after in (row["instructions"] for row in changed.values())]
    return {
        "triton": before["triton"],
        "torch": before["torch"],
        "variants": len(old),
        "identical": len(same),
        "missing": sorted(set(old) - set(new)),
        "added": sorted(set(new) - set(old)),
        "registers_differ": sum(row["registers"][0] != row["registers"][1] for row in changed.values()),
        "more_stack": sum(row["stack"][1] > row["stack"][0] for row in changed.values()),
        "instruction_ratio": [min(ratios, default=1.0), max(ratios, default=1.0)],
        "changed": changed,
        "after": {name: [row[key] for key in NUMBERS] for name, row in new.items()},
    }


def main() -> None:
    command, *files, out = sys.argv[1:]
    if command == "compile":
        document = compile_tree(Path(files[0]))
    else:
        read = [json.loads(Path(file).read_text()) for file in files]
        pairs = [compare(*pair) for pair in zip(read[::2], read[1::2], strict=True)]
        document = {"target": "sm_90", "numbers": NUMBERS, "comparisons": pairs}
        for pair in pairs:
            rest = {key: value for key, value in pair.items() if key not in ("changed", "after")}
            print(json.dumps(rest, indent=1))
    Path(out).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
