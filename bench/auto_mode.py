"""A monitor that may intervene, in runs that need no help: `python bench/auto_mode.py [--runs 200] [--out auto.json]`.

Each run draws a small language model, an optimizer, a rate and a text at random, and trains twice: alone, and under
`AttentionStabilityMonitor(auto_intervene=True, good_states=...)`. A run is healthy if its plain training is finite and
ends lower than it began. The script fails if a healthy run was changed: an intervention, or one bit of a weight.
No card is needed. `--seconds` stops it early; it then says how many runs were done.
"""

import argparse
import copy
import json
import random
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch
from machine import machine
from torch import Tensor, nn
from torch.nn import functional

from hnf_attention import AttentionStabilityMonitor
from hnf_attention.interventions import GoodStates

STEPS, LOG_EVERY, WORDS = 80, 10, 24
OPTIMIZERS = {
    "sgd": lambda p, rate: torch.optim.SGD(p, lr=10 * rate, momentum=0.9),
    "adam": lambda p, rate: torch.optim.Adam(p, lr=rate, betas=(0.9, 0.95)),
    "adamw": lambda p, rate: torch.optim.AdamW(p, lr=rate, weight_decay=0.1),
    "adagrad": lambda p, rate: torch.optim.Adagrad(p, lr=rate),
}


class Block(nn.Module):
    def __init__(self, width: int, heads: int, norm_first: bool):
        super().__init__()
        self.heads, self.norm_first = heads, norm_first
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        x = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(x.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        for part, norm in zip((self.attend, self.mlp), self.norms):
            x = x + part(norm(x)) if self.norm_first else norm(x + part(x))
        return x


class Model(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, length: int, norm_first: bool):
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads, norm_first) for _ in range(layers)))
        self.head = nn.Linear(width, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        places = self.places(torch.arange(tokens.shape[1]))
        return self.head(self.blocks(self.words(tokens) + places))


def recipe(seed: int) -> dict:
    """What a run is, drawn at random."""
    chance = random.Random(seed)
    heads = chance.choice([1, 2, 4])
    return {
        "seed": seed,
        "layers": chance.choice([1, 2, 3]),
        "width": heads * chance.choice([8, 16]),
        "heads": heads,
        "length": chance.choice([16, 24, 33]),
        "batch": chance.choice([2, 4, 8]),
        "norm_first": chance.random() < 0.7,
        "optimizer": chance.choice(list(OPTIMIZERS)),
        "rate": 10 ** chance.uniform(-3.5, -2.3),
        "clip": chance.choice([None, 1.0]),
        "bf16": chance.random() < 0.2,
        "text": chance.choice(["cycle", "copy", "markov"]),
    }


def tokens_of(wanted: dict, generator: torch.Generator) -> Tensor:
    """A batch of a text that can be learned, (batch, length + 1)."""
    size = wanted["batch"], wanted["length"] + 1
    if wanted["text"] == "cycle":
        start = torch.randint(WORDS, (size[0], 1), generator=generator)
        return (start + 5 * torch.arange(size[1])) % WORDS
    if wanted["text"] == "copy":
        half = torch.randint(WORDS, (size[0], size[1] // 2 + 1), generator=generator)
        return torch.cat([half, half], 1)[:, : size[1]]
    steps = torch.randint(1, 4, size, generator=generator)
    return steps.cumsum(1) % WORDS


def train(wanted: dict, monitored: bool) -> tuple[list[float], dict, int, list[str]]:
    """(losses, weights, interventions, issues above notes)."""
    torch.manual_seed(wanted["seed"])
    generator = torch.Generator().manual_seed(wanted["seed"])
    model = Model(*(wanted[x] for x in ("layers", "width", "heads", "length", "norm_first")))
    optimizer = OPTIMIZERS[wanted["optimizer"]](model.parameters(), wanted["rate"])
    monitor, losses, issues = None, [], []
    if monitored:
        states = GoodStates(model, optimizer, every=20)
        monitor = AttentionStabilityMonitor(
            model, log_every=LOG_EVERY, auto_intervene=True, good_states=states
        )
    for _ in range(STEPS):
        tokens = tokens_of(wanted, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=wanted["bf16"]):
            scores = model(tokens[:, :-1])
        loss = functional.cross_entropy(scores.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        if wanted["clip"] is not None:
            nn.utils.clip_grad_norm_(model.parameters(), wanted["clip"])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if monitor is not None:
            diagnosis = monitor.on_step(loss=loss)
            if diagnosis is not None:
                issues += [f"{x.severity}: {x.issue_type}" for x in diagnosis.issues if x.severity != "note"]
    applied = 0
    if monitor is not None:
        applied = len(monitor.applied)
        monitor.restore()
        states.remove()
    return losses, copy.deepcopy(model.state_dict()), applied, issues


def run(seed: int) -> dict:
    """One run twice, and what differs."""
    wanted = recipe(seed)
    losses, weights, _, _ = train(wanted, monitored=False)
    mine, watched, applied, issues = train(wanted, monitored=True)
    last = sum(losses[-10:]) / 10
    healthy = bool(torch.tensor(losses).isfinite().all()) and last < losses[0]
    same = mine == losses and all(torch.equal(weights[name], watched[name]) for name in weights)
    found = {"healthy": healthy, "same": same, "applied": applied, "issues": issues}
    return wanted | found | {"first_loss": losses[0], "last_loss": last}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first run")
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    began, found = time.monotonic(), []
    for seed in range(options.seed, options.seed + options.runs):
        if time.monotonic() - began > options.seconds:
            break
        found.append(run(seed))
        one = found[-1]
        if not one["same"] or one["applied"] or not one["healthy"] or one["issues"]:
            print(json.dumps(one), flush=True)
    healthy = [one for one in found if one["healthy"]]
    changed = [one["seed"] for one in healthy if not one["same"] or one["applied"]]
    if options.out is not None:
        document = {"machine": machine(), "steps": STEPS, "log_every": LOG_EVERY, "runs": found}
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    said = sum(bool(one["issues"]) for one in healthy)
    print(f"\nruns                                  {len(found)}")
    print(f"healthy                               {len(healthy)}")
    print(f"healthy, with a warning or an error   {said}")
    print(f"healthy, changed by the monitor       {len(changed)} {changed or ''}")
    return 1 if changed or not healthy else 0


if __name__ == "__main__":
    sys.exit(main())
