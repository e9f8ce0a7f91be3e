"""Markdown tables of result files; a file's content decides which.

forward and training suites: "core", our attention beside SDPA's at every case; "others", what ran at some.
bench/whole_step.py: "overhead" and "memory"; "summary", the shortest and longest sequences of each model.
bench/graphed.py: "graphed". bench/long_sequences.py: "long" and "errors".
bench/theory_soundness.py: "soundness" and "bits". bench/theory_kernels.py: "soundness".
bench/weight_bounds.py: "weights". bench/initial_predictions.py: "initial". bench/demo_seeds.py: "seeds".
"""

DASH = "–"  # not run, or not recorded by an older file


def tables(document: dict) -> dict[str, str]:
    """Name -> Markdown, in the order to print them; empty for a file of another kind."""
    if "benchmarks" in document and any("peer" in (b["params"] or {}) for b in document["benchmarks"]):
        ceiling = document["machine_info"].get("matmul_tflops")
        return _attention(_groups(document["benchmarks"]), ceiling)
    if "steps" in document:
        steps = document["steps"]
        return {"overhead": _overhead(steps), "memory": _memory(steps), "summary": _summary(steps)}
    if "graphed" in document:
        return {"graphed": _graphed(document["graphed"])}
    if "long" in document:
        return {"long": _long(document), "errors": _errors(document["long"])}
    if "soundness" in document:
        found = {"soundness": _soundness(document["soundness"])}
        heads = {f"query, key of a head, {kind}": x for kind, x in document.get("bits_of_heads", {}).items()}
        return found | ({"bits": _bits(document["bits"] | heads)} if "bits" in document else {})
    if "weight_bounds" in document:
        return {"weights": _weights(document["weight_bounds"])}
    if "initial" in document:
        return {"initial": _initial(document["initial"])}
    if document.get("rows") and "ratios" in document["rows"][0]:
        return _beside_peers(document["rows"])
    if "controls" in document:
        return {"seeds": _seeds(document)}
    return {}


def machine_line(document: dict) -> str:
    info = document.get("machine_info") or document["machine"]
    ceiling = info.get("matmul_tflops")
    measured = f"; matrix products at {ceiling:.0f} TFLOP/s" if ceiling else ""
    versions = f"torch {info['torch']}, Triton {info['triton']}, cuDNN {info['cudnn']}"
    return f"{info['device']}, bf16, {versions}{measured} ({info['date']})"


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table without its empty columns."""
    kept = [i for i in range(len(header)) if any(row[i] != DASH for row in rows)]
    lines = [header, ["---"] * len(header), *rows]
    joined = ["|".join(f" {line[i]} " for i in kept) for line in lines]
    joined[1] = joined[1].replace(" ", "")
    return "\n".join(f"|{line}|" for line in joined)


def _groups(benchmarks: list[dict]) -> dict[str, dict[str, dict]]:
    groups: dict[str, dict[str, dict]] = {}
    for benchmark in benchmarks:
        groups.setdefault(benchmark["group"], {})[benchmark["params"]["peer"]] = benchmark
    return groups


def _median(peers: dict[str, dict], name: str) -> float | None:
    return peers[name]["stats"]["median"] if name in peers else None


def _ms(seconds: float | None) -> str:
    return DASH if seconds is None else f"{seconds * 1e3:.3f} ms"


def _ratio(a: float | None, b: float | None) -> str:
    return DASH if None in (a, b) else f"{a / b:.2f}x"


def _size(count: float | None) -> str:
    return DASH if count is None else f"{count / 2**20:.0f} MiB"


CORE_NAMES = {"sdpa default": "SDPA default", "sdpa cudnn": "cuDNN", "sdpa flash": "FA2"}


def _attention(groups: dict[str, dict[str, dict]], ceiling: float | None) -> dict[str, str]:
    header = ["case", *CORE_NAMES.values(), "ours", "of SDPA default", "of FA2", "ours, TFLOP/s"]
    header += ["of the ceiling", "lse only, of SDPA default", "SDPA, peak memory", "ours, peak memory"]
    rows = []
    for group, peers in groups.items():
        default, ours = _median(peers, "sdpa default"), _median(peers, "ours")
        if default is None or ours is None:
            continue
        rate = peers["ours"]["extra_info"]["flop"] / ours / 1e12
        peaks = (peers[name]["extra_info"].get("peak_bytes") for name in ("sdpa default", "ours"))
        row = [group, *(_ms(_median(peers, name)) for name in CORE_NAMES), _ms(ours), _ratio(ours, default)]
        row += [_ratio(ours, _median(peers, "sdpa flash")), f"{rate:.0f}"]
        row += [f"{rate / ceiling:.0%}" if ceiling else DASH]
        rows.append([*row, _ratio(_median(peers, "ours, lse only"), default), *map(_size, peaks)])
    found = {"core": _markdown(header, rows)} if rows else {}
    named = {*CORE_NAMES, "ours", "ours, lse only"}
    others = list(dict.fromkeys(name for peers in groups.values() for name in peers if name not in named))
    rows = [
        _others(group, peers, others) for group, peers in groups.items() if any(o in peers for o in others)
    ]
    if rows:
        header = ["case", "SDPA default", "ours", *others]
        found["others"] = _markdown(header, rows)
    return found


def _others(group: str, peers: dict[str, dict], others: list[str]) -> list[str]:
    """Times of SDPA and ours; the others' times over SDPA's, with the call's memory if it is known."""
    default = _median(peers, "sdpa default")
    row = [group, _ms(default), _ms(_median(peers, "ours"))]
    for name in others:
        cell = _ratio(_median(peers, name), default)
        peak = peers[name]["extra_info"].get("peak_bytes") if name in peers else None
        row.append(cell if peak is None else f"{cell}, {_size(peak)}")
    return row


MODELS = {"gpt2": "GPT-2 124M", "llama": "LLaMA 1B"}
VARIANTS = {  # in the order and words of the tables
    "log_every=100": "monitored every 100 steps",
    "idle": "of which: not measured",
    "record_every=1": "measured every step",
    "log_every=1": "measured, read and judged every step",
    "eager": "eager, output_attentions=True",
}


def label(row: dict) -> str:
    return f"{MODELS.get(row['model'], row['model'])}, {row['tokens']} tokens"


def _over_plain(found: dict | str | None) -> str:
    if found is None:
        return DASH
    return found if isinstance(found, str) else f"{100 * found['overhead']:+.1f}%"


def _plain(row: dict) -> str:
    plain = row["variants"]["plain"]
    return plain if isinstance(plain, str) else f"{plain['ms']:.1f} ms"


def _overhead(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        run = row.get("long_run")
        really = DASH if not isinstance(run, dict) else _over_plain(run["monitored"])
        cells = (_over_plain(row["variants"].get(name)) for name in VARIANTS)
        lines.append([label(row), _plain(row), *cells, really])
    return _markdown(["step", "plain", *VARIANTS.values(), "every 100 steps, really run"], lines)


def _summary(rows: list[dict]) -> str:
    """The first and the last row of each model, and the variants that a newcomer compares."""
    ends: dict[str, list[dict]] = {}
    for row in rows:
        ends[row["model"]] = [*ends.get(row["model"], [])[:1], row]
    names = {"log_every=100": "monitored, log_every=100", "log_every=1": "monitored, log_every=1"}
    names["eager"] = "eager attention with output_attentions=True"
    lines = [
        [label(row), _plain(row), *(_over_plain(row["variants"].get(name)) for name in names)]
        for model in ends.values()
        for row in model
    ]
    return _markdown(["training step", "plain", *names.values()], lines)


def _memory(rows: list[dict]) -> str:
    names = {"plain": "plain"} | {name: text for name, text in VARIANTS.items() if name != "idle"}

    def cell(found) -> str:
        if isinstance(found, str):
            return found
        peak = None if found is None else found["peak_bytes"]
        return DASH if peak is None else f"{peak / 2**30:.2f} GiB"

    lines = [[label(row), *(cell(row["variants"].get(name)) for name in names)] for row in rows]
    return _markdown(["peak memory of a step", *names.values()], lines)


def _graphed(rows: list[dict]) -> str:
    header = ["model", "tokens", "plain", "every step recorded", "overhead"]
    return _markdown(
        header,
        [
            [
                f"{row['model']}, {row['parameters'] / 1e6:.0f}M",
                str(row["tokens"]),
                _ms(row["plain_ms"] / 1e3),
                _ms(row["recorded_ms"] / 1e3),
                f"{row['overhead']:+.1%}",
            ]
            for row in rows
        ],
    )


def _long(document: dict) -> str:
    ceiling = document["machine"].get("matmul_tflops")
    header = ["tokens", "call", "time", "TFLOP/s", "of the ceiling", "peak memory", "extra bytes a row"]
    lines = []
    for row in document["long"]:
        for name, found in row.items():
            if not isinstance(found, dict) or "ms" not in found:
                continue
            peak, extra = found.get("peak_bytes"), found.get("extra_bytes_a_row")
            lines.append(
                [
                    f"{row['length']} x {row['heads']} heads",
                    name,
                    f"{found['ms']:.1f} ms",
                    f"{found['tflops']:.0f}",
                    f"{found['tflops'] / ceiling:.0%}" if ceiling else DASH,
                    DASH if peak is None else f"{peak / 2**30:.2f} GiB",
                    DASH if extra is None else f"{extra:.1f}",
                ]
            )
    return _markdown(header, lines)


def _errors(rows: list[dict]) -> str:
    names = list(rows[0]["errors"])
    lines = [
        [str(row["length"]), str(row["checked_rows"]), *(f"{row['errors'][name]:.1e}" for name in names)]
        for row in rows
    ]
    return _markdown(["tokens", "rows", *names], lines)


def _soundness(modes: dict[str, dict]) -> str:
    parts = ("random", "climbed", "trained")
    header = ["arithmetic", "rows", "broken bounds", "bound / error, median: random rows", "hill-climbed"]
    header += ["of a trained model", "largest error / bound", "from p_max and norms", "from norms"]
    lines = []
    for mode, found in modes.items():
        rows, broken = (sum(found[part][name] for part in parts) for name in ("rows", "violations"))
        medians = [found[part]["median_row"] for part in parts]
        medians = [DASH if median is None else f"{median:.1f}" for median in medians]
        closest = max(found[part]["closest"] for part in parts)
        cheap = (f"{found['random'][f'median_{level}']:.0f}" for level in ("p_max", "norms"))
        lines.append([mode, f"{rows:,}", str(broken), *medians, f"{closest:.2f}", *cheap])
    return _markdown(header, lines)


def _bits(stored: dict[str, dict]) -> str:
    header = [
        "stored",
        "cases",
        "too few bits",
        "median excess: from the whole row",
        "from its largest numbers and weight",
    ]
    header += ["typical minus needed, 5% / 50% / 95%"]
    lines = [
        [
            name.replace("_", ", "),
            f"{found['cases']:,}",
            str(found["under_predictions"]),
            f"{found['median_excess_of_row']:.0f}" if "median_excess_of_row" in found else DASH,
            f"{found['median_excess']:.0f}",
            " / ".join(f"{x:+.0f}" for x in found["typical"]),
        ]
        for name, found in stored.items()
    ]
    return _markdown(header, lines)


def _weights(models: dict[str, dict]) -> str:
    header = ["model", "heads", "above their bound", "bound / true maximum: least, median, largest"]
    header += ["rank correlation with the true maximum: of the bound", "of the maximum on random tokens"]
    header += ["of another text's maximum", "largest scores"]
    lines = [
        [
            name,
            str(found["heads"]),
            str(found["violations"]),
            " / ".join(f"{x:.1f}" for x in found["bound_over_true"]),
            *(f"{found[f'spearman{of}']:.2f}" for of in ("", "_of_typical", "_of_other_text")),
            " to ".join(f"{x:.3g}" for x in found["true_range"]),
        ]
        for name, found in models.items()
    ]
    return _markdown(header, lines)


def _initial(models: dict[str, dict]) -> str:
    header = ["model", "keys", "predicted spread", "measured: first layer", "deeper"]
    header += ["row maximum: first layer", "deeper", "entropy, nats: first layer", "deeper"]
    lines = []
    for name, found in models.items():
        first, *deeper = found["layers"]
        cells = [name, str(found["length"]), f"{first['predicted']['score_std']:.3g}"]
        for what, form in (("score_std", "{:+.1%}"), ("row_max", "{:+.1%}"), ("entropy", "{:+.3f}")):
            off = [layer[f"{what}_off"] for layer in deeper]
            ends = [form.format(x) for x in sorted({min(off), max(off)})] if off else [DASH]
            cells += [form.format(first[f"{what}_off"]), " to ".join(ends)]
        lines.append(cells)
    return _markdown(header, lines)


def _seeds(document: dict) -> str:
    header = ["seed", "first warning", "first error", "behind", "loss shows it"]
    header += ["final loss, untreated", "treated", "healthy twin", "twins, best rate", "control"]
    lines = [
        [
            str(found["seed"]),
            *(_at_step(found[name]) for name in ("warning_step", "alarm_step", "hindsight_step")),
            _at_step(found["loss_shows"] and found["loss_shows"]["step"]),
            *(_final(found[f"{run}_final_loss"]) for run in ("untreated", "treated")),
            *map(_final, (twin["final_loss"], min(twin["by_rate"].values()), healthy["final_loss"])),
        ]
        for found, twin, healthy in zip(document["results"], document["twins"], document["controls"])
    ]
    return _markdown(header, lines)


KINDS = {"window": "windows", "pack": "packs", "sinks": "sinks", "padding": "padding", "error": "errors"}


def _beside_peers(rows: list[dict]) -> dict[str, str]:
    """A table for each kind of call: our time in ms, or our error, and its ratio to every peer's."""
    kinds: dict[str, list[dict]] = {}
    for row in rows:
        kinds.setdefault(KINDS.get(row["case"].split()[0].rstrip(",:"), "wide"), []).append(row)
    found = {}
    for kind, members in kinds.items():
        peers = list(dict.fromkeys(name for row in members for name in row["ratios"]))
        form = "{:.1e}" if kind == "errors" else "{:.3f} ms"
        lines = [
            [row["case"], form.format(row["found"]["ours"])]
            + [f"{row['ratios'][name]:.2f}x" if name in row["ratios"] else DASH for name in peers]
            for row in members
        ]
        found[kind] = _markdown(["case", "ours", *(f"of {name}" for name in peers)], lines)
    return found


def _at_step(step: int | None) -> str:
    return "never" if step is None else f"step {step}"


def _final(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.2f}"
