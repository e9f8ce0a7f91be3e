"""Ordinary healthy runs: models of transformers at usual rates, which should hear nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hnf_attention import instrument
from hnf_attention.monitoring.recorder import Recorder

from .batches import Batches
from .clock import OutOfTime
from .optimizers import BETA1
from .recipes import Recipe
from .record import Record, record_of
from .text import VOCABULARY

MASKED = 0.15  # share of the bytes that BERT has to guess
_MASK = 0  # the byte that stands for a masked one; text holds none
_BASE = Recipe(
    "",
    0,
    split="ordinary",
    kind="ordinary",
    context=256,
    batch=8,
    precision="bfloat16",
    steps=600,
    warmup=100,
    schedule="cosine",
    beta2=0.95,
    log_every=10,
)
#: (architecture, depth, width, heads, key/value heads, rate, steps). The rates are those of their authors or usual ones
#: for this size: GPT-2 124M 6e-4 (nanoGPT), small LLaMA models 1e-3.
_ORDINARY = (
    ("gpt2", 12, 768, 12, 12, 6e-4, 600),
    ("gpt2", 6, 384, 6, 6, 1e-3, 2000),
    ("gpt2", 2, 128, 4, 4, 1e-3, 10_000),
    ("llama", 8, 512, 8, 4, 1e-3, 600),
    ("llama", 6, 384, 6, 2, 1e-3, 2000),
    ("llama", 4, 256, 4, 4, 2e-3, 2000),
    ("qwen3", 8, 512, 8, 4, 1e-3, 600),
    ("qwen3", 4, 256, 4, 2, 2e-3, 2000),
    ("bert", 6, 384, 6, 6, 5e-4, 2000),
    ("bert", 4, 256, 4, 4, 1e-3, 2000),
    ("gemma2", 6, 384, 6, 2, 1e-3, 1000),
    ("gemma2", 4, 256, 4, 4, 1e-3, 1000),
    ("mistral", 6, 512, 8, 4, 6e-4, 2000),
    ("mistral", 4, 256, 4, 2, 1e-3, 2000),
    # Those that a CPU trains in minutes: a context of 128, batches of 4.
    ("gpt2", 2, 128, 4, 4, 1e-3, 2000),
    ("llama", 2, 128, 4, 2, 1e-3, 2000),
    ("qwen3", 2, 128, 4, 2, 1e-3, 2000),
    ("bert", 2, 128, 4, 4, 1e-3, 2000),
    ("gemma2", 2, 128, 4, 2, 1e-3, 2000),
    ("mistral", 2, 128, 4, 2, 1e-3, 2000),
)
_SMALL_WIDTH = 128  # of those


def recipes(small: bool = False) -> list[Recipe]:
    """The ordinary recipes. small: as tiny models of a few steps, one of each architecture."""
    found = []
    for number, (architecture, depth, width, heads, kv_heads, rate, steps) in enumerate(_ORDINARY):
        recipe = replace(
            _BASE,
            name=f"ordinary-{number:02d}-{architecture}-{depth}x{width}",
            seed=100 + number,
            architecture=architecture,
            depth=depth,
            width=width,
            heads=heads,
            kv_heads=kv_heads,
            rate=rate,
            steps=steps,
            # Fewer readings of long runs: 200 at most, in steps that a cadence of 10 has too.
            log_every=max(10, steps // 200 // 10 * 10),
        )
        if width <= _SMALL_WIDTH and steps <= 2000:
            recipe = replace(recipe, context=128, batch=4, precision="float32")
        found.append(recipe)
    if not small:
        return found
    tiny = {"depth": 2, "width": 32, "heads": 2, "kv_heads": 2, "context": 32, "batch": 4, "steps": 12}
    firsts = {recipe.architecture: recipe for recipe in reversed(found)}
    return [replace(x, **tiny, log_every=4, warmup=4, precision="float32") for x in firsts.values()]


def build(recipe: Recipe) -> nn.Module:
    """The model of a recipe with an architecture, with weights as transformers draws them.

    Raises ValueError for another architecture.
    """
    import transformers as t

    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": recipe.width,
        "num_hidden_layers": recipe.depth,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.kv_heads,
        "head_dim": recipe.head_dim,
        "intermediate_size": 8 * recipe.width // 3,
        "max_position_embeddings": recipe.context,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "use_cache": False,
    }
    classes = {
        "llama": (t.LlamaConfig, {}),
        "qwen3": (t.Qwen3Config, {}),
        "mistral": (t.MistralConfig, {"sliding_window": recipe.context // 4}),
        "gemma2": (
            t.Gemma2Config,
            {"sliding_window": recipe.context // 4, "query_pre_attn_scalar": recipe.head_dim},
        ),
    }
    torch.manual_seed(recipe.seed)
    if recipe.architecture == "gpt2":
        config = t.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=recipe.width,
            n_layer=recipe.depth,
            n_head=recipe.heads,
            n_positions=recipe.context,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
            # The trainings that this rate is known from have no dropout.
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
        )
        return t.GPT2LMHeadModel(config)
    if recipe.architecture == "bert":
        config = t.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=recipe.width,
            num_hidden_layers=recipe.depth,
            num_attention_heads=recipe.heads,
            intermediate_size=4 * recipe.width,
            max_position_embeddings=recipe.context,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=None,
        )
        return t.BertForMaskedLM(config)
    if recipe.architecture not in classes:
        known = sorted([*classes, "gpt2", "bert"])
        raise ValueError(f"expected an architecture in {known}, got {recipe.architecture!r}")
    config_class, more = classes[recipe.architecture]
    return t.AutoModelForCausalLM.from_config(config_class(**common, **more))


def train(recipe: Recipe, device: torch.device | str = "cpu", deadline: float = float("inf")) -> Record:
    """Train an ordinary recipe, watched at its log_every. Raises OutOfTime past the deadline."""
    model = build(recipe).to(device)
    with instrument(model, mode="probe") as instrumentation:
        recorder = Recorder(instrumentation, recipe.log_every, history_bytes=2**33, every_step=True)
        losses, norms = fit(model, recipe, deadline, recorder)
        history = list(recorder.history)
        recorder.stop()
    return record_of(recipe, losses, norms, history)


def fit(
    model: nn.Module, recipe: Recipe, deadline: float = float("inf"), recorder: Recorder | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Train the model of an ordinary recipe. Returns its losses and gradient norms, (steps,) each.

    Raises OutOfTime past the deadline.
    """
    device = next(model.parameters()).device
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=recipe.rate,
        betas=(BETA1, recipe.beta2),
        fused=device.type == "cuda",
    )
    losses, norms, rates = [], [], recipe.rates().tolist()
    low = None if recipe.precision == "float32" else getattr(torch, recipe.precision)
    model.train()
    for step, (inputs, targets) in enumerate(_batches(recipe, device)):
        if time.monotonic() > deadline:
            raise OutOfTime(f"{recipe.name} at step {step}")
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        with torch.autocast(device.type, dtype=low, enabled=low is not None):
            logits = model(input_ids=inputs).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip))
        optimizer.step()
        losses.append(loss.detach())
        if recorder is not None:
            recorder.advance()
    return torch.stack(losses).cpu().numpy(), torch.stack(norms).detach().cpu().numpy()


def _batches(recipe: Recipe, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets, (B, N) each: the next byte, or for BERT the bytes that are masked."""
    batches = Batches([recipe], recipe.steps, device)
    generator = torch.Generator().manual_seed(recipe.seed)
    for step in range(recipe.steps):
        inputs, targets = (part[0] for part in batches.at(step))
        if recipe.architecture == "bert":
            hidden = (torch.rand(inputs.shape, generator=generator) < MASKED).to(device)
            targets = torch.where(hidden, inputs, -100)
            inputs = torch.where(hidden, _MASK, inputs)
        yield inputs, targets
