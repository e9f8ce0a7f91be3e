"""`hnf-attention check`: judge a design before training, from a JSON file, a model's folder or a name on the hub."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import torch

from ..errors import InputError
from ..precheck import StabilityReport, check_attention_stability, known_design, stability_region
from ..report.check import verdict
from ..report.designs import CheckedDesign, lengths, short_names, side_by_side
from .exit_codes import FOUND, HEALTHY
from .failures import has_weights
from .loading import Loading, config_of_numbers, load_config, load_model, locate, quiet_transformers
from .output import check_figure, check_targets, for_people, shown, write_document, write_figure
from .paths import exists, is_folder
from .progress import shown_progress

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

LARGEST = 1 << 26  # bytes of a configuration; those of models have some thousand
SCHEMA_VERSION = 1  # of the document about several designs
Config = Union[dict[str, Any], "PretrainedConfig"]
_PASSING = {"unstable": ("stable", "marginal"), "marginal": ("stable",)}  # --fail-on -> verdicts


def run(options: argparse.Namespace) -> int:
    check_figure(options.region, "--region")
    targets = {"--json": options.json, "--region": options.region}
    check_targets(targets, options.designs)
    console = for_people(*targets.values())
    plan = {"warmup": options.warmup} if options.warmup is not None else {}
    if options.learning_rate is not None:
        plan["learning_rate"] = options.learning_rate
    names, found = list(options.designs), []
    several = len(names) > 1
    with shown_progress() as show:
        for number, name in enumerate(names, 1):
            show(f"checking {name}", *((number, len(names)) if several else (None, None)))
            found.append(check(name, options.seq_len, options.dtype, options.weights, plan))
    reports = [report for report, _ in found]
    compared = [
        CheckedDesign(name, report, _stable(config, options))
        for name, (report, config) in zip(names, found)
        if several
    ]
    console.print(side_by_side(compared) if several else verdict(reports[0], names[0]))
    if options.region is not None:
        _draw(names, [config for _, config in found], options)
        console.print(f"figure: {shown(options.region)}", highlight=False, markup=False)
    document = {"schema_version": SCHEMA_VERSION, "designs": [each.to_dict() for each in compared]}
    write_document(options.json, document if several else reports[0].to_dict())
    return HEALTHY if all(report["verdict"] in _PASSING[options.fail_on] for report in reports) else FOUND


def _stable(config: Config, options: argparse.Namespace) -> dict[int, float]:
    """Visible keys -> the lowest stable temperature, at three lengths; nothing where no formula knows the design."""
    try:
        design = known_design(config, seq_len=options.seq_len, dtype=options.dtype)
        keys = lengths(design.seq_len)
        region = stability_region(design, dims=[design.d_model], lengths=keys)
    except ValueError:
        return {}
    return dict(zip(keys, region.boundary[0].tolist()))


def _draw(names: Sequence[str], configs: Sequence[Config], options: argparse.Namespace) -> None:
    """The regions of all designs, beside each other."""
    regions = []
    for name, config in zip(names, configs):
        try:
            regions.append(
                stability_region(known_design(config, seq_len=options.seq_len, dtype=options.dtype))
            )
        except ValueError as error:
            raise InputError(f"{name}: no region: {error}") from error
    if len(regions) == 1:
        write_figure(options.region, regions[0].plot())
        return
    from ..figures.canvas import new_row

    panels = new_row(len(regions), 7.2, 4.4)
    for name, region, panel in zip(short_names(names), regions, panels):
        region.plot(ax=panel)
        name = name.replace("$", r"\$")  # no formula
        panel.set_title(f"{name}\n{panel.get_title(loc='left')}", loc="left", fontsize=9)
    write_figure(options.region, panels[0])


def check(
    name: str,
    seq_len: int | None,
    dtype: str | None,
    with_weights: bool,
    plan: Mapping[str, Any] | None = None,
) -> tuple[StabilityReport, Config]:
    """The report, and the configuration it was made from.

    plan: learning_rate and warmup, as for `check_attention_stability`.
    If a folder has weights that are not read, a note says what they would add.
    Raises InputError for whatever the user can put right.
    """
    model = None
    config: Config
    path = Path(name).expanduser()
    # A file, a pipe (`<(...)` of a shell), or nothing: no name on the hub ends like this.
    if not is_folder(path) and (exists(path) or path.suffix == ".json"):
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
    if not with_weights and is_folder(path) and has_weights(path):
        report["notes"].append(
            f"{name} has weights: --weights reads each head's spread of scores, and the largest score of any input"
        )
    return report, config


def read_json(path: Path) -> Config:
    """A configuration, or plain numbers if the file names no `model_type`.

    Raises InputError for a file that is not a JSON object.
    """
    try:
        size = path.stat().st_size  # 0 for a pipe
        if size <= LARGEST:
            with path.open("rb") as file:
                read = file.read(LARGEST + 1)
            size = len(read)
        config = json.loads(read.decode("utf-8")) if size <= LARGEST else None
    except OSError as error:
        raise InputError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # JSON's and UTF-8's
        raise InputError(f"expected a JSON configuration in {path}, got something else: {error}") from error
    if size > LARGEST:
        raise InputError(f"expected a configuration of at most {LARGEST:,} bytes in {path}, got more")
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
