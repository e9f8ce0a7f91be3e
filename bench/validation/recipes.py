"""What a training run of the laboratory is made of, and the sweeps of such recipes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

PRECISIONS = ("float32", "bfloat16", "float16", "float16 scaled")
EVENTS = ("", "bad batch", "bit in query", "bit in mlp", "tied keys")
SPLITS = ("calibration", "held-out", "shift", "ordinary")
KINDS = ("sweep", "output", "qk-norm", "bad batch", "fault", "fine-tuning", "ordinary")
#: What all members of an ensemble share; see `ensemble`.
SHARED = (
    "width",
    "depth",
    "heads",
    "kv_heads",
    "context",
    "batch",
    "norm",
    "positions",
    "optimizer",
    "precision",
    "steps",
    "pretrain",
    "log_every",
)


@dataclass(frozen=True)
class Recipe:
    """One training run. It determines the run but for the order of additions on a card.

    sharpness: factor on the usual scale head_dim ** -0.5 of the scores, 1 / temperature.
    init: factor on the standard deviation 0.02 of the initial weights. logit_scale: factor on the output logits.
    norm: "layer" with a GELU MLP, or "rms" with a SwiGLU MLP. positions: "learned" or "rope".
    label_noise: share of targets that are random bytes. clip: largest gradient norm, 0 for no clipping.
    schedule: "constant" or "cosine", behind a linear warmup.
    pretrain: steps on the Python sources at a usual rate before step 1, which the monitor does not see.
    event: one of EVENTS, from step `event_step` on. "bad batch": random bytes for five steps. "bit in ...": the
        highest exponent bit of one weight is flipped once. "tied keys": the batch is one byte repeated, for five steps.
    architecture: of transformers; "" for the laboratory's own GPT.
    kind: why the recipe is in the sweep, one of KINDS.
    """

    name: str
    seed: int
    split: str = "calibration"
    kind: str = "sweep"
    width: int = 128
    depth: int = 4
    heads: int = 4
    kv_heads: int = 4
    context: int = 128
    batch: int = 16
    norm: str = "layer"
    positions: str = "learned"
    sharpness: float = 1.0
    init: float = 1.0
    qk_norm: bool = False
    logit_scale: float = 1.0
    data: str = "python"
    label_noise: float = 0.0
    optimizer: str = "adamw"
    precision: str = "float32"
    steps: int = 500
    rate: float = 1e-3
    warmup: int = 20
    schedule: str = "constant"
    beta2: float = 0.99
    clip: float = 1.0
    weight_decay: float = 0.1
    pretrain: int = 0
    event: str = ""
    event_step: int = 0
    log_every: int = 10
    architecture: str = ""

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def shape(self) -> tuple[Any, ...]:
        """What the members of one ensemble share."""
        return tuple(getattr(self, name) for name in SHARED)

    @property
    def twin(self) -> Recipe:
        """The same run with QK-norm from the start."""
        return replace(self, qk_norm=True)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(items: dict[str, Any]) -> Recipe:
        return Recipe(**{field.name: items[field.name] for field in fields(Recipe) if field.name in items})

    def rates(self) -> np.ndarray:
        """The learning rate of each step, (steps,)."""
        step = np.arange(1, self.steps + 1)
        rates = self.rate * np.minimum(1.0, step / max(1, self.warmup))
        if self.schedule == "cosine":
            after = np.clip((step - self.warmup) / max(1, self.steps - self.warmup), 0.0, 1.0)
            rates = rates * (0.1 + 0.45 * (1.0 + np.cos(np.pi * after)))
        return rates

    def design(self) -> dict[str, Any]:
        """What `check_attention_stability` reads of it before training."""
        return {
            "d_model": self.width,
            "n_heads": self.heads,
            "n_kv_heads": self.kv_heads,
            "n_layers": self.depth,
            "seq_len": self.context,
            "init_std": 0.02 * self.init,
            "temperature": 1.0 / self.sharpness,
            "rope": self.positions == "rope",
            "qk_norm": self.qk_norm,
            "dtype": self.precision.split()[0],
        }


def sweep(split: str, ensembles: int, members: int, small: bool = False) -> list[Recipe]:
    """Recipes of a split: `ensembles` architectures of `members` recipes each, drawn from the split's own seeds.

    "calibration" and "held-out" come from one family. "shift" has other sizes, data and optimizers, and fine-tuning.
    small: models and runs that a CPU trains in seconds.
    """
    draw = np.random.default_rng([17, SPLITS.index(split)])
    found: list[Recipe] = []
    for number in range(ensembles):
        shared = _shared(draw, split, number, small)
        for member in range(members):
            seed = int(draw.integers(2**31))
            name = f"{split}-{number:02d}-{member:02d}"
            found.append(_member(draw, shared, Recipe(name, seed, split, **shared)))
    return found


def ensembles(recipes: list[Recipe]) -> list[list[Recipe]]:
    """The recipes in groups that one ensemble can train together, in their order."""
    groups: dict[tuple[Any, ...], list[Recipe]] = {}
    for recipe in recipes:
        groups.setdefault((recipe.name.rpartition("-")[0], *recipe.shape), []).append(recipe)
    return list(groups.values())


def _pick(draw: np.random.Generator, *choices: Any) -> Any:
    return choices[int(draw.integers(len(choices)))]


def _shared(draw: np.random.Generator, split: str, number: int, small: bool) -> dict[str, Any]:
    shift = split == "shift"
    width = _pick(draw, 192, 256) if shift else _pick(draw, 64, 96, 128, 192)
    depth = _pick(draw, 2, 6, 7) if shift else _pick(draw, 2, 3, 4, 5)
    head_dim = _pick(draw, 16, 64) if shift else _pick(draw, 16, 32)
    heads = width // head_dim
    items = {
        "width": width,
        "depth": depth,
        "heads": heads,
        "kv_heads": _pick(draw, heads, heads, heads // 2 if heads % 2 == 0 else heads),
        "context": _pick(draw, 96, 192) if shift else _pick(draw, 64, 128),
        "batch": 8 if shift else 16,
        "norm": _pick(draw, "layer", "layer", "rms"),
        "positions": _pick(draw, "learned", "rope"),
        "optimizer": "muon" if shift and number % 3 == 0 else "adamw",
        "precision": _pick(draw, "float32", "bfloat16", "bfloat16", "float32", "float16 scaled", "float16"),
        "pretrain": 300 if shift and number % 3 == 1 else 0,
        "steps": 600 if shift else 500,
        "log_every": 10,
    }
    if number % 8 == 4:  # read at every step, so that slower cadences can be taken from it; of few heads
        items |= {"width": 64, "depth": 3, "heads": 2, "kv_heads": 2, "log_every": 1}
    if small:
        items |= {"width": 32, "depth": 2, "heads": 2, "kv_heads": 2, "context": 32, "batch": 4, "steps": 60}
        items |= {"pretrain": min(items["pretrain"], 10), "log_every": 1 if number % 2 else 5}
    return items


def _member(draw: np.random.Generator, shared: dict[str, Any], base: Recipe) -> Recipe:
    """A recipe of an ensemble: two in three run in the sweep of temperatures and rates, the others fail elsewhere."""
    shift = base.split == "shift"
    kind = str(draw.choice(KINDS[:5], p=(0.70, 0.08, 0.08, 0.07, 0.07)))
    items: dict[str, Any] = {
        "sharpness": float(draw.choice([0.5, 1.0, 2.0, 4.0, 8.0], p=(0.05, 0.25, 0.2, 0.25, 0.25))),
        "init": float(draw.choice([0.5, 1.0, 2.0, 4.0], p=(0.1, 0.6, 0.2, 0.1))),
        "rate": float(np.exp(draw.uniform(np.log(6e-4), np.log(3e-2)))),
        "warmup": int(_pick(draw, 5, 20, 100, 200)),
        "schedule": _pick(draw, "constant", "constant", "cosine"),
        "beta2": float(_pick(draw, 0.95, 0.99, 0.999)),
        "clip": float(_pick(draw, 0.0, 1.0, 1.0)),
        "weight_decay": float(_pick(draw, 0.0, 0.1)),
        "label_noise": float(_pick(draw, 0.0, 0.0, 0.1)),
        "data": _pick(draw, "prose", "tables", "copy") if shift else "python",
    }
    if kind == "output":
        items |= {"logit_scale": float(_pick(draw, 8.0, 30.0)), "sharpness": 1.0, "init": 1.0}
    elif kind == "qk-norm":
        items |= {"qk_norm": True, "rate": float(np.exp(draw.uniform(np.log(5e-3), np.log(1e-1))))}
    elif kind in ("bad batch", "fault"):  # in an otherwise usual run
        chosen = (
            _pick(draw, "bit in query", "bit in mlp")
            if kind == "fault"
            else _pick(draw, "bad batch", "tied keys")
        )
        at = int(draw.integers(base.steps // 3, base.steps * 2 // 3))
        rate = float(np.exp(draw.uniform(np.log(3e-4), np.log(3e-3))))
        items |= {"event": chosen, "event_step": at, "sharpness": 1.0, "init": 1.0, "rate": rate}
    if base.pretrain:
        kind = "fine-tuning" if kind == "sweep" else kind
    return replace(base, kind=kind, **items)
