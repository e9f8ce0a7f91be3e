"""What `hnf-attention check` reads: a JSON file, a model's folder or a name on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..precheck.check import check_attention_stability
from ..precheck.design import read_design
from ..precheck.region import StabilityRegion, stability_region
from ..precheck.report import StabilityReport
from .analyze import _load_model, _loading, _locate, _quiet_transformers

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # as transformers names them


def check(
    name: str, seq_len: int | None, dtype: str | None, with_weights: bool
) -> tuple[StabilityReport, Any]:
    """The report, and the configuration it was made from. Raises InputError for what the user can put right.

    Of a folder with weights that are not asked for, a note says what they would add.
    """
    model = None
    if Path(name).is_file():
        config = read_json(Path(name))
        if with_weights:
            raise InputError(f"expected a model's folder or name for --weights, got the file {name}")
    else:
        with _quiet_transformers():
            from transformers import AutoConfig

            place = _locate(name)
            with _loading("the configuration", name):
                config = AutoConfig.from_pretrained(place)
            if with_weights:
                model = _load_model(place, config, torch.float32)
    try:
        report = check_attention_stability(model, None, config, seq_len=seq_len, dtype=dtype)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error
    if not with_weights and any(next(Path(name).glob(pattern), None) for pattern in WEIGHTS):
        report["notes"].append(
            f"{name} has weights: --weights reads each head's spread of scores, and the largest that any input can give"
        )
    return report, config


def region_of(config: Any, seq_len: int | None, dtype: str | None) -> StabilityRegion:
    return stability_region(read_design(config, seq_len=seq_len, dtype=dtype))


def read_json(path: Path) -> dict[str, Any]:
    """A configuration or plain numbers from a file; what a model type leaves out, its class fills in.

    Raises InputError for a file that is no JSON object.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the configuration {path}: {error.strerror}") from error
    except ValueError as error:  # JSON's and UTF-8's
        raise InputError(f"expected a JSON configuration in {path}, got something else: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"expected a JSON object in {path}, got a {type(config).__name__}")
    if "model_type" not in config:
        return config
    with _quiet_transformers():
        from transformers import AutoConfig

        with _loading("the configuration", str(path)):
            return AutoConfig.for_model(**config)
