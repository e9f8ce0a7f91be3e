"""The faults that `triage_causes` injects, each with the layer, the heads and the cause that a trace has to name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hnf_attention.diagnosis.triage import causes

from . import triage_models as models
from .triage_models import BATCH, HEAD_DIM, HEADS, LENGTH, VOCABULARY, WIDTH, Setup, setup

ALL = tuple(range(HEADS))


@dataclass(frozen=True)
class Expected:
    """What a trace has to say. layer: its name, None for none. heads: () where no head is concerned in particular."""

    cause: str
    layer: str | None
    heads: tuple[int, ...] = ()


Fault = Callable[[int, int], tuple[Setup, Expected]]
FAULTS: dict[str, Fault] = {}


def fault(name: str) -> Callable[[Fault], Fault]:
    """Register a fault: a function of (layer, head)."""

    def register(make: Fault) -> Fault:
        FAULTS[name] = make
        return make

    return register


def scale_head(made: Setup, layer: int, head: int, factor: float) -> None:
    """Multiply the query and key weights of one head; with GQA those of the key head that it reads."""
    with torch.no_grad():
        query = made.module("query", layer)
        columns = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        if type(query).__name__ == "Conv1D":
            query.weight[:, columns] *= factor
            query.weight[:, WIDTH:][:, columns] *= factor
            return
        key = made.module("key", layer)
        query.weight[columns] *= factor
        group = WIDTH // key.out_features
        start = head // group * HEAD_DIM
        key.weight[start : start + HEAD_DIM] *= factor


def products(name: str, cause: str, factor: float, **options: Any) -> None:
    @fault(name)
    def make(layer: int, head: int) -> tuple[Setup, Expected]:
        made = setup(**options)
        scale_head(made, layer, head, factor)
        return made, Expected(cause, made.name("layer", layer), (head,))


products("fp16 product, GPT-2 eager", causes.FP16_PRODUCT, 4e3, family="gpt2", dtype="float16")
products("fp16 product, BERT eager", causes.FP16_PRODUCT, 4e3, family="bert", dtype="float16")
products("fp16 product, plain", causes.FP16_PRODUCT, 1.5e3, family="plain", dtype="float16")
products("fp16 product, autocast", causes.FP16_PRODUCT, 4e3, family="gpt2", dtype="autocast float16")
products("fp16 product, GQA", causes.FP16_PRODUCT, 4e3, family="llama", dtype="autocast float16")
products("fp32 product, GPT-2 SDPA", causes.PRODUCT, 1e21, family="gpt2", implementation="sdpa")
products("fp32 product, BERT eager", causes.PRODUCT, 1e21, family="bert")
products("bf16 product, plain", causes.PRODUCT, 1e20, family="plain", dtype="bfloat16")
products("naive softmax, fp32", causes.NAIVE_SOFTMAX, 25.0, family="plain", softmax="naive")
products("naive softmax, fp16", causes.NAIVE_SOFTMAX, 12.0, family="plain", softmax="naive", dtype="float16")
products("naive softmax, bf16", causes.NAIVE_SOFTMAX, 25.0, family="plain", softmax="naive", dtype="bfloat16")


def open_mask(dtype: torch.dtype = torch.float32) -> Tensor:
    """An additive causal mask (B, 1, M, N)."""
    future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    return torch.zeros(LENGTH, LENGTH, dtype=dtype).masked_fill(future, -torch.inf).repeat(BATCH, 1, 1, 1)


def masks(name: str, cause: str, value: float, family: str) -> None:
    @fault(name)
    def make(layer: int, head: int) -> tuple[Setup, Expected]:
        made = setup(family)
        mask = open_mask()
        mask[layer % BATCH, 0, 3 + head] = value
        made.inputs["attention_mask"] = mask
        return made, Expected(cause, made.name("layer", 0), ALL)


masks("fully masked row, GPT-2 eager", causes.EMPTY_ROW, -torch.inf, "gpt2")
masks("fully masked row, LLaMA eager", causes.EMPTY_ROW, -torch.inf, "llama")
masks("NaN in the mask, BERT eager", causes.MASK, torch.nan, "bert")
masks("+inf in the mask, GPT-2 eager", causes.MASK, torch.inf, "gpt2")


def biases(name: str, cause: str, value: float) -> None:
    @fault(name)
    def make(layer: int, head: int) -> tuple[Setup, Expected]:
        made = setup("plain")
        made.module("layer", layer).bias[0, head, 5] = value
        return made, Expected(cause, made.name("layer", layer), (head,))


biases("fully masked row of one head", causes.EMPTY_ROW, -torch.inf)
biases("NaN in one head's position bias", causes.MASK, torch.nan)


def embeddings(name: str, value: float, family: str) -> None:
    @fault(name)
    def make(layer: int, head: int) -> tuple[Setup, Expected]:
        made = setup(family)
        embedded = made.module("embed", 0)(made.inputs.pop("input_ids")).detach()
        embedded[layer % BATCH, head] = value
        made.inputs["inputs_embeds"] = embedded
        return made, Expected(causes.INPUT, "any")


embeddings("NaN in the input embeddings, GPT-2", torch.nan, "gpt2")
embeddings("inf in the input embeddings, LLaMA", torch.inf, "llama")


def weights(
    name: str, role: str, family: str, value: float = torch.nan, tensor: str = "weight", **options: Any
) -> None:
    @fault(name)
    def make(layer: int, head: int) -> tuple[Setup, Expected]:
        made = setup(family, **options)
        module = made.module(role, layer)
        parameter = getattr(module, tensor)
        at = head * HEAD_DIM + 3
        with torch.no_grad():
            if role == "embed":
                at = int(made.inputs["input_ids"][0, head])
            if type(module).__name__ == "Conv1D" and tensor == "weight":
                parameter[2, at] = value
            else:
                parameter[at % len(parameter)] = value
        if role in ("query", "key", "value"):
            heads: tuple[int, ...] = (head,)
            if len(parameter) < WIDTH:  # a key head of two query heads
                at = at % len(parameter) // HEAD_DIM
                heads = (2 * at, 2 * at + 1)
            return made, Expected(causes.WEIGHT, made.name("layer", layer), heads)
        own = made.name(role, layer)
        around = made.name("layer", layer)
        return made, Expected(causes.WEIGHT, around if own.startswith(f"{around}.") else own)


weights("NaN in a query weight, GPT-2", "query", "gpt2")
weights("NaN in a query weight, LLaMA SDPA", "query", "llama", implementation="sdpa")
weights("inf in a key weight, LLaMA GQA", "key", "llama", torch.inf)
weights("NaN in a value weight, BERT SDPA", "value", "bert", implementation="sdpa")
weights("NaN in a query bias, BERT", "query", "bert", tensor="bias")
weights("NaN in an output projection, LLaMA", "out", "llama")
weights("NaN in an MLP weight, BERT", "mlp", "bert")
weights("inf in an MLP weight, LLaMA bf16", "mlp", "llama", torch.inf, dtype="bfloat16")
weights("NaN in a norm's weight, GPT-2", "norm", "gpt2")
weights("NaN in a row of the embedding, LLaMA", "embed", "llama")


def hooked(
    name: str, role: str, family: str, change: Callable[[Tensor, int], Tensor], cause: str, **options: Any
) -> None:
    @fault(name)
    def make(layer: int, head: int) -> tuple[Setup, Expected]:
        made = setup(family, **options)
        made.module(role, layer).register_forward_hook(lambda _m, _i, out: change(out, head))
        one = role in ("query", "key", "value")
        layer_name = made.name("layer" if one else role, layer)
        return made, Expected(cause, layer_name, (head,) if one else ())


def write(value: float) -> Callable[[Tensor, int], Tensor]:
    def change(out: Tensor, head: int) -> Tensor:
        out = out.clone()
        out[1, 4, head * HEAD_DIM + 1] = value
        return out

    return change


def flip(out: Tensor, head: int) -> Tensor:
    """One number is multiplied as a flipped bit of its exponent does it, twice."""
    factors = torch.ones_like(out)
    factors[1, 4, head] = 2.0**127
    return out * factors * factors


hooked("inf written into the MLP, GPT-2", "mlp", "gpt2", write(torch.inf), causes.WRITTEN)
hooked("-inf written into the MLP, BERT", "mlp", "bert", write(-torch.inf), causes.WRITTEN)
hooked("NaN written into one head's queries", "query", "plain", write(torch.nan), causes.WRITTEN)
hooked("a flipped bit in the MLP, BERT", "mlp", "bert", flip, causes.ACTIVATION)


def grown(name: str, role: str, family: str, factor: float, **options: Any) -> None:
    @fault(name)
    def make(layer: int, head: int) -> tuple[Setup, Expected]:
        made = setup(family, **options)
        with torch.no_grad():
            made.module(role, layer).weight.mul_(factor)
        own, around = made.name(role, layer), made.name("layer", layer)
        return made, Expected(causes.ACTIVATION, around if own.startswith(f"{around}.") else own)


grown("fp16 overflow in the MLP, GPT-2", "mlp", "gpt2", 3e6, dtype="autocast float16")
grown("fp16 overflow in the MLP, LLaMA", "mlp", "llama", 3e6, dtype="autocast float16")
grown("fp16 overflow of the logits", "head", "plain", 3e5, dtype="autocast float16")


@fault("norm of zeros without epsilon, LLaMA")
def _norm(layer: int, head: int) -> tuple[Setup, Expected]:
    made = setup("llama")
    norm = made.module("norm", layer)
    norm.variance_epsilon = 0.0
    if layer == 0:
        with torch.no_grad():
            made.module("embed", 0).weight[made.inputs["input_ids"][1, head]] = 0.0
    else:
        made.model.get_submodule(f"model.layers.{layer - 1}").register_forward_hook(
            lambda _m, _i, out: torch.cat([out[:, :-1], 0 * out[:, -1:]], 1)
        )
    return made, Expected(causes.UNDEFINED, made.name("norm", layer))


@fault("logarithm of a probability of 0")
def _logarithm(layer: int, head: int) -> tuple[Setup, Expected]:
    made = setup("gpt2")
    labels = made.inputs.pop("labels")
    with torch.no_grad():
        made.module("embed", 0).weight.mul_(2e3)
    made.loss = lambda out: (
        -out.logits.softmax(-1).gather(2, (labels[..., None] + 1) % VOCABULARY).log().mean()
    )
    return made, Expected(causes.UNDEFINED, None)


@fault("a batch without targets")
def _no_targets(layer: int, head: int) -> tuple[Setup, Expected]:
    made = setup(("gpt2", "llama", "plain")[layer % 3])
    made.inputs["labels"].fill_(-100)
    return made, Expected(causes.NO_TARGETS, "any")


@fault("a forward kernel at fault")
def _kernel(layer: int, head: int) -> tuple[Setup, Expected]:
    made = setup("plain")
    made.module("layer", layer).softmax = "kernel"
    models.fault.append((head, "forward"))
    return made, Expected(causes.KERNEL, made.name("layer", layer), (head,))


@fault("a backward kernel at fault")
def _backward_kernel(layer: int, head: int) -> tuple[Setup, Expected]:
    made = setup("plain")
    made.module("layer", layer).softmax = "kernel"
    models.fault.append((head, "backward"))
    return made, Expected(causes.KERNEL, made.name("layer", layer), (head,))


@fault("gradient overflow of one head, fp16")
def _gradient(layer: int, head: int) -> tuple[Setup, Expected]:
    made = setup("plain", dtype="float16")
    made.module("layer", layer).gradient = (head, 6e4)
    made.scaler = torch.amp.GradScaler(models.device(), init_scale=2.0**13)
    return made, Expected(causes.GRADIENT, made.name("layer", layer), (head,))


@fault("gradient overflow in the MLP, fp16")
def _mlp_gradient(layer: int, head: int) -> tuple[Setup, Expected]:
    made = setup("gpt2", dtype="float16")
    factor = torch.tensor(6e4, dtype=torch.float16)
    made.module("mlp", layer).register_forward_hook(
        lambda _m, _i, out: models.ScaledGradient.apply(out, factor)
    )
    made.scaler = torch.amp.GradScaler(models.device(), init_scale=2.0**14)
    return made, Expected(causes.GRADIENT, made.name("mlp", layer))


@fault("gradient of a root at 0")
def _root(layer: int, head: int) -> tuple[Setup, Expected]:
    made = setup("plain")
    made.module("mlp", layer).register_forward_hook(
        lambda _m, _i, out: out + (out - out.detach()).abs().sqrt()
    )
    return made, Expected(causes.UNDEFINED, made.name("mlp", layer))


@fault("loss scale beyond float16")
def _scale(layer: int, head: int) -> tuple[Setup, Expected]:
    made = setup("gpt2", dtype="float16")
    made.scaler = torch.amp.GradScaler(models.device(), init_scale=2.0 ** (17 + layer))
    made.loss = lambda out: out.loss.half()
    return made, Expected(causes.GRADIENT, None)


def scaled(name: str, scale: float, family: str) -> None:
    @fault(name)
    def make(layer: int, head: int) -> tuple[Setup, Expected]:
        made = setup(family, dtype="autocast float16")
        made.optimizer = torch.optim.SGD(made.model.parameters(), 0.1)
        made.scaler = torch.amp.GradScaler(models.device(), init_scale=scale)
        return made, Expected(causes.SCALER, None)


scaled("loss scale of 0", 0.0, "gpt2")
scaled("loss scale whose inverse is inf", 1e-40, "plain")


def zero_gradient(made: Setup, layer: int) -> str:
    """Make the gradient of one weight 0; returns its module's name."""
    made.module("mlp", layer).weight.register_hook(lambda gradient: gradient * 0)
    return made.name("mlp", layer)


def epsilons(name: str, dtype: str = "float32", eps: float = 0.0, **options: Any) -> None:
    @fault(name)
    def make(layer: int, head: int) -> tuple[Setup, Expected]:
        made = setup("plain", dtype=dtype)
        made.inputs["input_ids"] = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH)
        made.model.embed.weight.requires_grad_(False)
        module = zero_gradient(made, layer)
        for block in made.model.blocks:  # a key's bias has a gradient of 0 by itself
            block.attention.key.bias.requires_grad_(False)
        made.optimizer = torch.optim.AdamW(
            [x for x in made.model.parameters() if x.requires_grad],
            1e-3,
            eps=eps,
            weight_decay=0.0,
            **options,
        )
        return made, Expected(causes.EPSILON, module)


epsilons("epsilon 0", foreach=False)
epsilons("epsilon 0, foreach", foreach=True)
epsilons("epsilon 0, fused", fused=True)


def moments(name: str, **options: Any) -> None:
    @fault(name)
    def make(layer: int, head: int) -> tuple[Setup, Expected]:
        made = setup("gpt2")
        made.module("mlp", layer).weight.register_hook(lambda gradient: gradient * 1e24)
        made.optimizer = torch.optim.AdamW(made.model.parameters(), 1e-3, **options)
        return made, Expected(causes.SECOND_MOMENT, made.name("mlp", layer))


moments("second moment overflow", foreach=False)
moments("second moment overflow, foreach", foreach=True)
moments("second moment overflow, fused", fused=True)


@fault("NaN in the second moment")
def _state(layer: int, head: int) -> tuple[Setup, Expected]:
    made = setup("llama", "sdpa")
    made.optimizer = torch.optim.AdamW(made.model.parameters(), 1e-3)
    made.run().loss.backward()
    made.optimizer.step()
    made.optimizer.zero_grad()
    made.optimizer.state[made.module("mlp", layer).weight]["exp_avg_sq"][head, 3] = torch.nan
    return made, Expected(causes.OPTIMIZER_STATE, made.name("mlp", layer))


@fault("an update beyond float32")
def _update(layer: int, head: int) -> tuple[Setup, Expected]:
    made = setup("gpt2")
    made.module("mlp", layer).weight.register_hook(lambda gradient: gradient * 1e30)
    made.optimizer = torch.optim.SGD(made.model.parameters(), 1e15)
    return made, Expected(causes.UPDATE, made.name("mlp", layer))
