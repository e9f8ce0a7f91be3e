"""What a design's model class tells beyond the fields of its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .configuration import hugging_face, read_design
from .design import Design
from .predict import predict_layer
from .random_layer import QUICK, RandomLayers, random_layers
from .shrink import Unknown

# Factors between the spread of the class and of a design. Own choice: up to ALIKE the design's own number is kept.
# A field that is found by the spread has to explain it up to EXACT.
_ALIKE, _EXACT = 1.3, 1.12
# A row's spread does not depend on its length, unless positions add to the scores: ALiBi's grows in proportion.
_GROWTH = 1.5


def known_design(config: Any, **given: Any) -> Design:
    """`read_design`, with what the model's class tells. Raises ValueError as both `read_design` and `with_class`."""
    return with_class(read_design(config, **given), config)


def with_class(design: Design, config: Any) -> Design:
    """The design with what the class of a Hugging Face configuration does and no field says.

    Its first layer is built with random weights and run (`random_layers`). If the scores spread as the design says,
    the design stays. Otherwise QK-norm and a scale of 1 are tried; if neither explains the spread, the measured
    spread takes the place of the formula's. Plain numbers, which belong to no class, stay as they are.
    Raises Unknown as `random_layers`, if positions add to the scores, and for a mapping whose `model_type` transformers
    does not know.
    """
    known = hugging_face(config)
    if known is None:
        if isinstance(config, Mapping) and config.get("model_type"):
            raise Unknown(
                f"transformers has no configuration of model_type {config['model_type']!r} with these fields"
            )
        return design
    first = random_layers(known, 1, QUICK)
    if not 1 / _GROWTH < first.early / first.stds[0] < _GROWTH:
        raise Unknown("positions add to its scores, which spread more in longer rows")
    change = _explanation(design, first)
    # Attention of other widths than d_model and the heads may match by accident at one width.
    if first.narrower and change != _explanation(design, random_layers(known, 1, QUICK // 4)):
        change = None
    if change is not None:
        return _changed(design, change, "its class, with random weights")
    try:
        found = random_layers(known, 2)  # a first layer may read what no norm layer has normalised
    except Unknown:
        found = random_layers(known, 1)
    small = _design_of(found, design)
    spread = tuple(std / predict_layer(small, i).score_std for i, std in enumerate(found.stds))
    return _changed(design, {"spread": spread}, "its class, with random weights")


def _design_of(found: RandomLayers, design: Design) -> Design:
    try:
        return read_design(found.config, seq_len=design.seq_len, dtype=design.dtype)
    except ValueError as error:
        raise Unknown(f"its configuration cannot be made small: {error}") from error


def _explanation(design: Design, found: RandomLayers) -> dict[str, Any] | None:
    """The changes of the design that explain the spread of its layers; none if it does, None if nothing does."""
    small = _design_of(found, design)
    changes: list[tuple[dict[str, Any], float]] = [({}, _ALIKE)]
    if found.qk_norm and not small.qk_norm:  # seen, and therefore tried first
        changes.insert(0, ({"qk_norm": True}, _ALIKE))
    elif not found.qk_norm:
        changes.append(({"scale": 1.0}, _EXACT))
    for change, factor in changes:
        if _factor(replace(small, **change), found.stds[0]) < factor:
            return change
    return None


def _factor(design: Design, std: float) -> float:
    """How far the design's spread is from this one, as a factor of at least 1."""
    predicted = predict_layer(design, 0).score_std
    return max(std / predicted, predicted / std)


def _changed(design: Design, change: dict[str, Any], source: str) -> Design:
    return replace(design, sources=design.sources | dict.fromkeys(change, source), **change)
