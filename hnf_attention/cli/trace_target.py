"""The step that `hnf-attention trace` runs: of a function of the user's, or of a Hugging Face model on a text."""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from runpy import run_path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError
from .analysis import check_language_model, check_vocabulary
from .analyze import loading_of
from .loading import load_config, load_model, load_tokenizer, locate, quiet_transformers
from .messages import one_line
from .paths import is_folder
from .progress import Progress
from .texts import SAMPLE, SAMPLE_NAME, read_text, split, window_length

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from .loading import Place

_KEYS = ("model", "batch", "loss", "optimizer", "scaler")
#: Options of models and texts, with what they are where they are not given.
_OF_TEXTS: dict[str, Any] = {"text": None, "window": None, "batch_size": 8}
_OF_MODELS = {
    **_OF_TEXTS,
    "dtype": "float32",
    **dict.fromkeys(("revision", "attn_implementation", "device", "device_map", "inputs", "autocast")),
}


def is_function(target: str) -> bool:
    """Whether the target is FILE.py:FUNCTION or MODULE:FUNCTION; names of models hold no colon.

    Raises InputError for a file of Python without a function.
    """
    file = target.removesuffix(":")
    if file.endswith(".py") and not is_folder(Path(file)):
        raise InputError(f"expected a function of the file, as in {file}:FUNCTION, got {target}")
    return ":" in target


def step_of_function(options: argparse.Namespace) -> dict[str, Any]:
    """The step that the function returns, as arguments of `trace_non_finite`.

    Raises InputError for a file, module or function that is not there, that fails, or that returns no step.
    """
    _refuse(options, _OF_MODELS, f"a model, got the function {options.target}, which makes its own step")
    make = _function(options.target)
    try:
        step = make()
    except Exception as error:
        raise InputError(f"{options.target} failed: {type(error).__name__}: {one_line(error)}") from error
    if isinstance(step, tuple) and len(step) == 2:
        step = dict(zip(_KEYS, step))
    if not isinstance(step, Mapping) or not {"model", "batch"} <= step.keys() or step.keys() - {*_KEYS}:
        got = type(step).__name__
        if isinstance(step, Mapping):
            got = f"a dict of {', '.join(map(str, step))}"
        raise InputError(
            f"expected {options.target} to return (model, batch) or a dict of model and batch, and perhaps loss, "
            f"optimizer and scaler, got {got}"
        )
    return dict(step)


def _refuse(options: argparse.Namespace, without: Mapping[str, Any], instead: str) -> None:
    """Raise InputError if one of these options is given."""
    for name, absent in without.items():
        if getattr(options, name) != absent:
            raise InputError(f"expected --{name.replace('_', '-')} for {instead}")


def _function(target: str) -> Callable[[], Any]:
    place, _, name = target.rpartition(":")
    try:
        if place.endswith(".py"):
            sys.path.insert(0, str(Path(place).resolve().parent))
            found = run_path(place).get(name)
        else:
            sys.path.insert(0, str(Path.cwd()))
            found = getattr(importlib.import_module(place), name, None)
    except Exception as error:
        raise InputError(f"cannot import {place}: {type(error).__name__}: {one_line(error)}") from error
    finally:
        sys.path.pop(0)
    if not callable(found):
        raise InputError(f"expected a function {name} in {place}, got none")
    function: Callable[[], Any] = found
    return function


def step_of_model(options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """The step of a model on the first windows of a text, or on given inputs, as arguments of `trace_non_finite`.

    Raises InputError for whatever the user can put right.
    """
    loading = loading_of(options)
    if options.inputs is not None:
        _refuse(options, _OF_TEXTS, "a text, got --inputs, which takes its place")
    with quiet_transformers():
        place = locate(options.target, options.revision)
        progress("loading the configuration", None, None)
        config = load_config(place)
        batch = None if options.inputs is None else _read_inputs(options.inputs)
        if batch is None:
            check_language_model(config, place)
            batch = _windows(options, config, place)
        progress("loading the model", None, None)
        model = load_model(place, config, loading)
    if "input_ids" in batch:
        check_vocabulary(model, batch["input_ids"], place)
    accepted = inspect.signature(model.forward).parameters
    if "labels" not in accepted and "labels" in batch and options.inputs is None:
        del batch["labels"]
    moved = {name: x.to(model.device) for name, x in batch.items()}
    return {"model": model, "batch": _under_autocast(model, moved, options.autocast)}


def _windows(options: argparse.Namespace, config: PretrainedConfig, place: Place) -> dict[str, Tensor]:
    tokenizer = load_tokenizer(place)
    window = window_length(config, tokenizer, str(place), options.window)
    text = read_text(options.text or SAMPLE)
    windows, _ = split(tokenizer, text, window, str(options.text or SAMPLE_NAME))
    ids = windows[: options.batch_size]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def _read_inputs(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:
        found = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"expected a safetensors file in {path}, got {found}") from error


def _under_autocast(model: PreTrainedModel, batch: dict[str, Tensor], dtype: str | None) -> Any:
    """The batch itself, or what runs the model on it under autocast."""
    if dtype is None:
        return batch
    device = model.device.type

    def run() -> Any:
        with torch.autocast(device, getattr(torch, dtype)):
            return model(**batch)

    return run
