"""Will this attention be stable, in this precision, at this length? The check before training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .. import theory
from ..names import display_name
from . import rates
from .checkpoint import read_weights
from .configuration import hugging_face, read_design
from .design import Design
from .estimates import from_measurement, from_weights
from .measured import measure_sample
from .model_class import with_class
from .predict import predict_layers
from .random_tokens import random_token_maxima
from .report import StabilityReport
from .shrink import Unknown
from .summarise import Evidence, summarise


def check_attention_stability(
    model: nn.Module | None = None,
    sample_input: Any = None,
    config: Any = None,
    *,
    seq_len: int | None = None,
    dtype: object = None,
    tolerance: float = theory.TOLERANCE,
    learning_rate: float | None = None,
    warmup: int = rates.WARMUP,
    optimizer: str = "adamw",
) -> StabilityReport:
    """Check attention before training. Returns a `StabilityReport`, a dict whose class lists the keys.

    config: a Hugging Face configuration, a mapping, or any object with such attributes (`read_design`); None takes
        `model.config`. Alone it gives predictions for random weights. The first layer of a Hugging Face class is built
        with random weights and run, which takes seconds. What its configuration does not say is thereby found.
    model: its weights give each head's expected spread of scores, and the largest score that any input can give.
        Without a sample it runs once on a few short sequences of random tokens, for the largest score to expect.
    sample_input: token ids (B, N), another input of the model, or a mapping for keyword arguments. The model runs
        it once, measured. Without a model, its second dimension is the length.
    seq_len: visible keys; None takes the sample's length, else the configuration's.
    dtype: of q, k and v; None takes the model's.
    tolerance: the error of an output that rounding may cause, over the spread of the values; between 0 and 1.
    learning_rate: the largest of the training run; with it, the report says how often attention harmed runs like this
        one, and the verdict counts it. warmup: steps up to it. optimizer: "adam" or "adamw".

    The verdict is "not known" if that class cannot be built and run, and no sample is measured; a note says why.
    A measured number is preferred to one from weights, then a predicted one, then an assumed one. `sources` says
    which each number is.
    Raises ValueError for a configuration without a needed field (with the names tried), sizes that make no
    attention, an unknown dtype, a tolerance outside (0, 1), a wrong rate, warmup or optimizer, and a model without
    attention; TypeError for a model that is not a module.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module or None, got {type(model).__name__}")
    if not 0 < tolerance < 1:
        raise ValueError(f"expected tolerance between 0 and 1, got {tolerance!r}")
    plan = rates.checked_plan(learning_rate, warmup, optimizer)
    if config is None:
        config = getattr(model, "config", None)
    if dtype is None and model is not None:
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    design = read_design(config, seq_len=seq_len or _length(sample_input), dtype=dtype)
    unknown = None
    try:
        design = with_class(design, config)
    except Unknown as reason:
        unknown = str(reason)
    evidence = Evidence(predict_layers(design), unknown=unknown)
    evidence.notes += [f"not used: {name}" for name in design.unused]
    if getattr(hugging_face(config), "auto_map", None):
        evidence.notes.append(
            "the configuration names code of its own (auto_map), which was not run: the class of transformers was read"
        )
    if model is not None:
        _read_model(evidence, model, sample_input, design)
    return summarise(design, evidence, tolerance, plan)


def _read_model(evidence: Evidence, model: nn.Module, sample: Any, design: Design) -> None:
    """Add what the weights say, and what a run measures. What fails is a note."""
    if any(p.is_meta for p in model.parameters()):
        evidence.notes.append("the model is on the meta device: it has no weights to read")
        return
    unread: ValueError | None = None
    try:
        evidence.weights, reasons = read_weights(model, design)
        evidence.notes += [
            f"weights of {display_name(name)} not read: {why}" for name, why in reasons.items()
        ]
    except ValueError as error:  # no class of attention is known, but a run may still show some
        unread = error
        evidence.notes.append(f"weights not read: {error}")
    evidence.found = from_weights(design, evidence.weights) or evidence.found
    if sample is not None:
        try:
            evidence.measured, reasons, evidence.diagnosis = measure_sample(model, sample)
            evidence.notes += [f"{display_name(name)} not measured: {why}" for name, why in reasons.items()]
        except ValueError as error:
            evidence.notes.append(f"not measured: {error}")
        evidence.found = from_measurement(design, evidence.measured) or evidence.found
    if unread is not None and evidence.diagnosis is None:
        raise unread
    if evidence.weights and not evidence.measured:
        try:
            evidence.typical = random_token_maxima(model, design.seq_len)
        except Exception as error:  # the user did not ask for this run, so no failure of it may end the check
            evidence.notes.append(f"not run on random tokens: {type(error).__name__}: {error}")


def _length(sample: Any) -> int | None:
    if isinstance(sample, Mapping):
        sample = next((x for x in sample.values() if isinstance(x, Tensor) and x.dim() >= 2), None)
    shape = getattr(sample, "shape", None)
    if shape is None:
        return None
    if len(shape) < 2 or not shape[1]:
        raise ValueError(f"expected sample_input of shape (batch, length, ...), got {tuple(shape)}")
    return int(shape[1])
