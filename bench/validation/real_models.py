"""Experiment 3: theory against observation in real models, and the patterns of their heads by depth.

    python -m bench.validation.real_models FOLDER [NAME ...] [--small] [--text FILE] [--trained RECIPE ...]

NAME: a model of the Hugging Face hub or a local folder with its tokenizer: gpt2, meta-llama/Llama-3.2-1B,
mistralai/Mistral-7B-v0.3, sentence-transformers/all-MiniLM-L6-v2. Without names: GPT-2, LLaMA and Mistral
architectures are trained here from scratch on the standard library's sources, and on a card full-size configurations
are measured at initialisation. FOLDER gets real_models.json and a figure of each model. --trained: which of the
ordinary recipes. --small: tiny models on the CPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hnf_attention import AttentionAnalyzer, check_attention_stability
from hnf_attention.engine import api
from hnf_attention.instrumentation import Measurement
from hnf_attention.statistics.heads import HeadStats

from . import ordinary
from .text import text

LOW = "bfloat16"  # the format whose rounding is looked at
_TRAINED = ("gpt2-6x384", "llama-6x384", "mistral-6x512")


class Subject(NamedTuple):
    """A model to look at. sample: token ids (B, N). origin: where its weights come from."""

    name: str
    origin: str
    model: nn.Module
    config: Any
    sample: Tensor


def trained_here(names: Sequence[str], small: bool, device: torch.device) -> Iterator[Subject]:
    """Ordinary recipes whose names end so, trained to their end on this device; of small ones, those of _TRAINED."""
    kinds = tuple(name.partition("-")[0] for name in _TRAINED)
    for recipe in ordinary.recipes(small):
        if not (recipe.architecture in kinds if small else recipe.name.endswith(tuple(names))):
            continue
        model = ordinary.build(recipe).to(device)
        losses, _ = ordinary.fit(model, recipe)
        held_out = text("python", held_out=True)
        starts = torch.arange(4)[:, None] * recipe.context
        sample = held_out[starts + torch.arange(recipe.context)].long().to(device)
        origin = f"trained here for {recipe.steps} steps to a loss of {losses[-40:].mean():.2f}"
        yield Subject(recipe.name, origin, model.eval(), model.config, sample)


def at_initialisation(device: torch.device) -> Iterator[Subject]:
    """Configurations of published sizes with the random weights of transformers; deep ones cut to 8 layers."""
    import transformers as t

    large = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 8}
    configs = {
        "GPT-2 124M": t.GPT2Config(),
        "GPT-2 1.5B, 8 layers": t.GPT2Config(n_embd=1600, n_head=25, n_layer=8),
        "LLaMA 8B, 8 layers": t.LlamaConfig(**large, intermediate_size=14336, max_position_embeddings=1024),
        "Mistral 7B, 8 layers": t.MistralConfig(
            **large, intermediate_size=14336, max_position_embeddings=1024
        ),
    }
    for name, config in configs.items():
        torch.manual_seed(0)
        with device:
            model = t.AutoModel.from_config(config).eval()
            sample = torch.randint(config.vocab_size, (2, 1024))
        yield Subject(name, "random weights", model, config, sample)


def named(names: list[str], path: Path | None, device: torch.device) -> Iterator[Subject]:
    """Models of the hub or of local folders, on a text of their own tokenizer. Raises InputError as `analyze` does."""
    from hnf_attention.cli.loading import Loading, load_config, load_model, load_tokenizer, locate
    from hnf_attention.cli.texts import SAMPLE, read_text, split, window_length

    for name in names:
        place = locate(name)
        config, tokenizer = load_config(place), load_tokenizer(place)
        window = window_length(config, tokenizer, str(place), None)
        windows, _ = split(tokenizer, read_text(path or SAMPLE), window, str(path or "built-in text"))
        model = load_model(place, config, Loading(device=device)).eval()
        yield Subject(
            name.rstrip("/").rpartition("/")[2], "published weights", model, config, windows[:4].to(device)
        )


@torch.no_grad()
def look(subject: Subject) -> dict[str, Any]:
    """Theory and observation of every layer, as JSON types."""
    length = subject.sample.shape[1]
    alone = check_attention_stability(config=subject.config, seq_len=length)
    weights = check_attention_stability(subject.model, config=subject.config, seq_len=length)
    measured = check_attention_stability(subject.model, subject.sample, subject.config)
    errors: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    with AttentionAnalyzer(subject.model) as analyzer:
        record = analyzer.instrumentation.on_measure

        def both(measurement: Measurement) -> None:
            record(measurement)
            if measurement.query is not None:
                errors[measurement.layer] = errors_of(measurement)

        analyzer.instrumentation.on_measure = both
        subject.model(subject.sample)
        diagnosis = analyzer.diagnose()
    layers = []
    for index, (name, stats) in enumerate(diagnosis.stats.items()):
        theories = [report["layers"][min(index, len(report["layers"]) - 1)] for report in (alone, weights)]
        seen = next((x for x in measured["layers"] if x["layer"] == name), measured["layers"][index])
        layers.append(_layer(name, stats, theories, seen, errors.get(name)))
    return {
        "name": subject.name,
        "origin": subject.origin,
        "sample": list(subject.sample.shape),
        "verdicts": {
            "config": alone["verdict"],
            "weights": weights["verdict"],
            "measured": measured["verdict"],
        },
        "issues": [issue.headline for issue in diagnosis.issues],
        "layers": layers,
    }


def _layer(
    name: str,
    stats: HeadStats,
    theories: list[dict[str, Any]],
    seen: dict[str, Any],
    errors: tuple[np.ndarray, np.ndarray] | None,
) -> dict[str, Any]:
    low = replace(stats, dtype=LOW)
    rows = {
        "score_std": [theory["score_std"] for theory in theories] + [seen["score_std"]],
        "largest_score": [theory["expected_logit_max"] for theory in theories] + [seen["expected_logit_max"]],
        "normalized_entropy": [theory["normalized_entropy"] for theory in theories]
        + [stats.normalized_entropy.mean()],
    }
    heads = {
        "normalized_entropy": stats.normalized_entropy,
        "sink_mass": stats.sink_mass,
        "max_abs_logit": stats.max_abs_logit,
        "log2_curvature": stats.log2_curvature,
        "typical_bits": stats.typical_bits,
        "required_bits": stats.required_bits,
        "error_bound": low.error_bound,
    }
    if errors is not None:
        heads["error"], heads["storage_error"] = errors
    rows, plain = (
        {key: [_finite(x) for x in values] for key, values in part.items()} for part in (rows, heads)
    )
    return {"layer": name, "config, weights, measured": rows, "heads": plain}


def _finite(number: float) -> float | None:
    return float(number) if np.isfinite(number) else None


def errors_of(measurement: Measurement) -> tuple[np.ndarray, np.ndarray]:
    """Two errors in LOW, (H,) each, the largest of any row: of the forward pass, and of storing q and k.

    The first is that of one output, in units of the largest |v|, given inputs in LOW: what `error_bound` limits. The
    second is the sum over keys of |change of a weight| by the rounding of q and k: the largest change of an output,
    in the same units, for the values that suffer most.
    """
    query, key, options = measurement.query, measurement.key, measurement.options
    rounded = [x.to(getattr(torch, LOW)) for x in (query, key)]

    def weights(query: Tensor, key: Tensor) -> Tensor:
        keys = torch.eye(key.shape[2], dtype=key.dtype, device=key.device).expand(*key.shape[:2], -1, -1)
        return api.attend(query, key, keys, options)[0].double()

    low, exact = weights(*rounded), weights(*(x.double() for x in rounded))
    before = weights(query.double(), key.double())
    found = (low - exact).abs().amax((0, 2, 3)), (exact - before).abs().sum(-1).amax((0, 2))
    return found[0].cpu().numpy(), found[1].cpu().numpy()


def figure(found: dict[str, Any], path: Path) -> None:
    """Four panels by depth: spread, largest score, sinks and entropy, curvature with bits and errors."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(drawing)
    panels = drawing.subplots(2, 2)
    depth = np.arange(len(found["layers"]))
    for panel, key, unit in (
        (panels[0, 0], "score_std", "spread of scores, nats"),
        (panels[0, 1], "largest_score", "largest score above the mean, nats"),
    ):
        values = np.array([layer["config, weights, measured"][key] for layer in found["layers"]], dtype=float)
        for column, label in enumerate(("from the configuration", "from the weights", "measured")):
            panel.plot(depth, values[:, column], marker="o", label=label)
        panel.set(xlabel="layer", ylabel=unit)
        panel.legend()

    def heads(key: str) -> list[list[float]]:
        return [
            [np.nan if x is None else x for x in layer["heads"].get(key, [])] for layer in found["layers"]
        ]

    for key, color in (("normalized_entropy", "tab:blue"), ("sink_mass", "tab:orange")):
        for layer, values in enumerate(heads(key)):
            panels[1, 0].plot(
                [layer] * len(values), values, ".", color=color, label=key if layer == 0 else None
            )
    panels[1, 0].set(xlabel="layer", ylabel="of each head", ylim=(-0.02, 1.02))
    panels[1, 0].legend()
    panel = panels[1, 1]
    for key, label in (
        ("error_bound", f"proved bound of the error in {LOW}, q and k given"),
        ("error", "observed error"),
        ("storage_error", f"observed change by q and k in {LOW}"),
    ):
        tops = [max(values, default=np.nan) for values in heads(key)]
        panel.semilogy(depth, tops, marker="o", label=label)
    panel.set(xlabel="layer", ylabel="of the largest |v|")
    beside = panel.twinx()
    beside.plot(depth, [np.nanmax(x) for x in heads("log2_curvature")], "k--", label="log2 curvature")
    beside.set(ylabel="bits")
    panel.legend(loc="upper left")
    beside.legend(loc="lower right")
    drawing.suptitle(f"{found['name']}: {found['origin']}")
    drawing.savefig(path, dpi=80)


def summary(found: dict[str, Any]) -> str:
    """One line: how far theory is from observation, and what the heads do."""
    rows = np.array(
        [
            [layer["config, weights, measured"][key] for key in ("score_std", "largest_score")]
            for layer in found["layers"]
        ],
        dtype=float,
    )  # (layers, 2, 3)
    off = np.median(np.abs(rows[..., :2] / rows[..., 2:] - 1.0), axis=0)
    sinks = np.concatenate([np.array(layer["heads"]["sink_mass"], dtype=float) for layer in found["layers"]])
    bits = max(max(x or 0.0 for x in layer["heads"]["typical_bits"]) for layer in found["layers"])
    errors = [layer["heads"] for layer in found["layers"] if "error" in layer["heads"]]
    close = max(
        (x / y for each in errors for x, y in zip(each["error"], each["error_bound"])), default=np.nan
    )
    return (
        f"{found['name']} ({found['origin']}): spread off by {off[0, 0]:.0%} from the configuration, {off[0, 1]:.0%} "
        f"from the weights; largest score by {off[1, 0]:.0%}, {off[1, 1]:.0%}; {(sinks > 0.3).mean():.0%} of heads "
        f"with a sink; {bits:.0f} bits usually enough; error at most {close:.0%} of its bound; "
        f"{found['verdicts']['measured']}, {len(found['issues'])} issues"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--trained", nargs="+", default=_TRAINED, metavar="RECIPE")
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not given.small else "cpu")
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.names:
        subjects = named(given.names, given.text, device)
    else:
        subjects = trained_here(given.trained, given.small, device)
    found = []
    for subject in subjects:
        found.append(look(subject))
        print(summary(found[-1]), flush=True)
    if not given.names and device.type == "cuda":
        for subject in at_initialisation(device):
            found.append(look(subject))
            print(summary(found[-1]), flush=True)
    for each in found:
        figure(each, given.folder / f"{each['name'].replace(' ', '_').replace(',', '')}.png")
    (given.folder / "real_models.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
