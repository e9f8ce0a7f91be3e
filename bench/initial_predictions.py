"""Scores at initialisation: what `check_attention_stability` predicts from a configuration, and what is measured.

    python bench/initial_predictions.py OUT.json [--layers 8] [--length 1024] [--dry]

Models of real shapes run on random tokens, in fp32, as transformers initialises them; deep models are cut to that
many layers. The last sixteenth of the rows counts, which see nearly all N keys, over all heads: score_std, the root
mean square spread within a row; row_max, the mean of a row's largest score minus its mean score; entropy, the mean,
brought from a row's n keys to N by adding ln(N / n). The theory is about the first layer. In deeper layers the
tokens have grown alike, so these are reported apart. Goals for the first layer: score_std within 5% (10% with
grouped heads or RoPE), row_max within 5%, entropy within 0.05 nats where sigma is below sigma_c / 2. Exit code 1 if
a goal is missed. --dry: narrow models on a CPU.
"""

import argparse
import json
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(root), str(root / "bench")]

import torch
from machine import machine
from tables import tables
from transformers import AutoModel, BertConfig, GPT2Config, LlamaConfig, MistralConfig, PreTrainedConfig

from hnf_attention import check_attention_stability, instrument, theory
from hnf_attention.engine import api
from hnf_attention.instrumentation import Measurement

ROWS = 16  # the last 1 / ROWS of the rows counts
STD, STD_WITH_ROPE, ROW_MAX, ENTROPY = 0.05, 0.10, 0.05, 0.05  # goals


def _gpt2(width: int, heads: int, layers: int, length: int) -> GPT2Config:
    return GPT2Config(n_embd=width, n_head=heads, n_layer=layers, n_positions=length)


def _llama(kind: type, width: int, inner: int, heads: int, layers: int, length: int) -> PreTrainedConfig:
    return kind(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=width // heads,
        num_hidden_layers=layers,
        max_position_embeddings=length,
    )


def _bert(width: int, heads: int, layers: int, length: int) -> BertConfig:
    return BertConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        max_position_embeddings=length,
    )


def configurations(layers: int, length: int, dry: bool) -> dict[str, PreTrainedConfig]:
    if dry:
        return {
            "GPT-2, narrow": _gpt2(384, 6, layers, length),
            "LLaMA, narrow": _llama(LlamaConfig, 512, 1024, 16, layers, length),
            "BERT, narrow": _bert(384, 6, layers, min(length, 512)),
        }
    return {
        "GPT-2 124M": _gpt2(768, 12, min(layers, 12), length),
        "GPT-2 355M": _gpt2(1024, 16, layers, length),
        "GPT-2 774M": _gpt2(1280, 20, layers, length),
        "GPT-2 1.5B": _gpt2(1600, 25, layers, length),
        "LLaMA 1B": _llama(LlamaConfig, 2048, 8192, 32, layers, length),
        "LLaMA 8B": _llama(LlamaConfig, 4096, 14336, 32, layers, length),
        "Mistral 7B": _llama(MistralConfig, 4096, 14336, 32, layers, length),
        "BERT base": _bert(768, 12, min(layers, 12), min(length, 512)),
    }


def _read(measurement: Measurement) -> dict[str, float]:
    rows = api.attend(measurement.query, measurement.key, None, measurement.options, extended=True)[1]
    rows = rows.detach()
    chosen = slice(-max(1, rows.lse.shape[2] // ROWS), None)
    entropy = rows.entropy + (measurement.key.shape[2] / rows.visible_keys).log()
    std, entropy, top = (
        x[:, :, chosen].double() for x in (rows.score_std, entropy, rows.max_logit - rows.score_mean)
    )
    return {
        "score_std": float(std.square().mean().sqrt()),
        "row_max": float(top.mean()),
        "entropy": float(entropy.mean()),
    }


@torch.no_grad()
def measure(
    config: PreTrainedConfig, batch: int, length: int, device: torch.device
) -> list[dict[str, float]]:
    """The measured numbers of each layer, in order."""
    torch.manual_seed(0)
    with device:
        model = AutoModel.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
        tokens = torch.randint(config.vocab_size, (batch, length))
    found: list[dict[str, float]] = []
    with instrument(model, mode="probe") as instrumentation:
        instrumentation.on_measure = lambda measurement: found.append(_read(measurement))
        model(input_ids=tokens)
    return found


def predict(config: PreTrainedConfig, length: int) -> list[dict[str, float]]:
    report = check_attention_stability(config=config, seq_len=length)
    return [
        {
            "score_std": layer["score_std"],
            "row_max": layer["expected_logit_max"],
            "entropy": layer["normalized_entropy"] * float(torch.tensor(float(layer["keys"])).log()),
            "sigma_ratio": layer["sigma_ratio"],
        }
        for layer in report["layers"]
    ]


def compare(name: str, config: PreTrainedConfig, batch: int, length: int, device: torch.device) -> dict:
    measured, predicted = measure(config, batch, length, device), predict(config, length)
    if len(measured) != len(predicted):
        raise RuntimeError(f"expected {len(predicted)} measured layers of {name}, got {len(measured)}")
    layers = [
        {
            "measured": found,
            "predicted": wanted,
            "score_std_off": found["score_std"] / wanted["score_std"] - 1.0,
            "row_max_off": found["row_max"] / wanted["row_max"] - 1.0,
            "entropy_off": found["entropy"] - wanted["entropy"],
        }
        for found, wanted in zip(measured, predicted, strict=True)
    ]
    first, wanted = layers[0], predicted[0]
    turned = bool(getattr(config, "rope_parameters", None))
    cold = wanted["score_std"] <= float(theory.critical_std(length)) / 2.0
    missed = [
        goal
        for goal, off, allowed in (
            ("score_std", first["score_std_off"], STD_WITH_ROPE if turned else STD),
            ("row_max", first["row_max_off"], ROW_MAX),
            ("entropy", first["entropy_off"], ENTROPY if cold else float("inf")),
        )
        if abs(off) > allowed
    ]
    return {"length": length, "batch": batch, "layers": layers, "missed": missed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--dry", action="store_true")
    given = parser.parse_args()
    layers, length = (
        (min(given.layers, 2), min(given.length, 128)) if given.dry else (given.layers, given.length)
    )
    device = torch.device("cuda" if torch.cuda.is_available() and not given.dry else "cpu")
    found = {}
    for name, config in configurations(layers, length, given.dry).items():
        found[name] = compare(name, config, 2, min(length, config.max_position_embeddings), device)
        print(name, *found[name]["missed"], flush=True)
    document = {"machine": machine(), "seed": 0, "initial": found}
    given.out.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(tables(document)["initial"])
    return int(any(result["missed"] for result in found.values()))


if __name__ == "__main__":
    raise SystemExit(main())
