"""`hnf-attention check`: judge a design before training, from a JSON file, a model's folder or a name on the hub."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError
from ..precheck import StabilityReport, check_attention_stability, known_design, stability_region
from ..report.check import verdict
from .exit_codes import FOUND, HEALTHY
from .failures import has_weights
from .loading import Loading, config_of_numbers, load_config, load_model, locate, quiet_transformers
from .output import check_figure, check_target, for_people, write_document

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

LARGEST = 1 << 26  # bytes of a configuration; those of models have some thousand
_PASSING = {"unstable": ("stable", "marginal"), "marginal": ("stable",)}  # --fail-on -> verdicts


def run(options: argparse.Namespace) -> int:
    check_target(options.json, "--json")
    check_figure(options.region, "--region")
    console = for_people(options.json)
    plan = {"warmup": options.warmup} if options.warmup is not None else {}
    if options.learning_rate is not None:
        plan["learning_rate"] = options.learning_rate
    report, config = check(options.config, options.seq_len, options.dtype, options.weights, plan)
    console.print(verdict(report, options.config))
    if options.region is not None:
        try:
            design = known_design(config, seq_len=options.seq_len, dtype=options.dtype)
        except ValueError as error:
            raise InputError(f"{options.config}: no region: {error}") from error
        stability_region(design).plot(options.region)
        console.print(f"figure: {options.region}", highlight=False, markup=False)
    write_document(options.json, report.to_dict())
    return HEALTHY if report["verdict"] in _PASSING[options.fail_on] else FOUND


def check(
    name: str,
    seq_len: int | None,
    dtype: str | None,
    with_weights: bool,
    plan: Mapping[str, Any] | None = None,
) -> tuple[StabilityReport, dict[str, Any] | PretrainedConfig]:
    """The report, and the configuration it was made from.

    plan: learning_rate and warmup, as for `check_attention_stability`.
    If a folder has weights that are not read, a note says what they would add.
    Raises InputError for whatever the user can put right.
    """
    model = None
    config: dict[str, Any] | PretrainedConfig
    path = Path(name).expanduser()
    if path.is_file() or (path.suffix == ".json" and not path.is_dir()):  # no name on the hub ends like this
        config = read_json(path)
        if with_weights:
            raise InputError(f"expected a model's folder or name for --weights, got the file {name}")
    else:
        with quiet_transformers():
            place = locate(name)
            config = load_config(place)
            if with_weights:
                model = load_model(place, config, Loading())
                _check_finite(model, name)
    try:
        report = check_attention_stability(model, None, config, seq_len=seq_len, dtype=dtype, **(plan or {}))
    except OverflowError as error:
        raise InputError(f"{name}: a number is too large: {error}") from error
    except ValueError as error:
        # The library names its argument, the command line its option.
        message = str(error).replace("give seq_len", "give --seq-len N")
        raise InputError(f"{name}: {message}") from error
    if not with_weights and path.is_dir() and has_weights(path):
        report["notes"].append(
            f"{name} has weights: --weights reads each head's spread of scores, and the largest score of any input"
        )
    return report, config


def read_json(path: Path) -> dict[str, Any] | PretrainedConfig:
    """A configuration, or plain numbers if the file names no `model_type`.

    Raises InputError for a file that is not a JSON object.
    """
    try:
        size = path.stat().st_size
        config = json.loads(path.read_text(encoding="utf-8")) if size <= LARGEST else None
    except OSError as error:
        raise InputError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # JSON's and UTF-8's
        raise InputError(f"expected a JSON configuration in {path}, got something else: {error}") from error
    if size > LARGEST:
        raise InputError(f"expected a configuration of at most {LARGEST:,} bytes in {path}, got {size:,}")
    if not isinstance(config, dict):
        raise InputError(f"expected a JSON object in {path}, got a {type(config).__name__}")
    if "model_type" not in config:
        return config
    with quiet_transformers():
        return config_of_numbers(config, str(path))


def _check_finite(model: PreTrainedModel, name: str) -> None:
    broken = [key for key, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    if broken:
        raise InputError(
            f"expected finite weights in {name}, got NaN or infinity in {len(broken)} of its tensors, the first is "
            f"{broken[0]}"
        )
