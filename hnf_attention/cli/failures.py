"""Why a model cannot be loaded, in one line that says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import InputError
from .messages import nearest, one_line
from .paths import is_file

ADAPTER, CONFIG, PIPELINE = "adapter_config.json", "config.json", "model_index.json"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # the names that transformers gives to files of weights
_DAMAGED = (
    "SafetensorError",
    "UnpicklingError",
    "EOFError",
    "JSONDecodeError",
)  # what readers of files raise
_UNREACHABLE = "couldn't connect to"  # part of the message of transformers
_TOKENIZER = ("*token*", "*vocab*", "*.model", "merges.txt", "spiece*")  # what files of tokenizers are called


def check_folder(folder: Path) -> None:
    """Raise InputError, which says what the folder holds instead, unless it may hold a whole model."""
    adapter = folder / ADAPTER
    if is_file(adapter) and not (is_file(folder / CONFIG) and has_weights(folder)):
        raise InputError(f"{folder} {_is_an_adapter(_base_of(adapter))}")
    if is_file(folder / CONFIG):
        return
    if is_file(folder / PIPELINE):
        raise InputError(
            f"{folder} is a pipeline of several models; give the folder of one, such as text_encoder"
        )
    found = sorted(path.name for path in folder.iterdir())
    held = (
        f"got {', '.join(found[:3])}{', ...' if len(found) > 3 else ''}" if found else "got an empty folder"
    )
    raise InputError(f"expected {CONFIG} of a Hugging Face model in the folder {folder}, {held}")


def check_tokenizer(folder: Path) -> None:
    """Raise InputError if the folder has no file of a tokenizer."""
    if not any(next(folder.glob(pattern), None) for pattern in _TOKENIZER):
        raise InputError(
            f"expected a tokenizer beside the model in {folder}, got none; save it there with "
            "tokenizer.save_pretrained"
        )


def has_weights(folder: Path) -> bool:
    """Whether the folder holds a file of a whole model's weights; those of an adapter do not count."""
    return any(not path.name.startswith("adapter") for name in WEIGHTS for path in folder.glob(name))


def check_model_type(numbers: dict[str, Any], source: str) -> None:
    """Raise InputError unless transformers knows the `model_type` of a configuration."""
    from transformers import CONFIG_MAPPING, __version__

    name, known = numbers["model_type"], list(CONFIG_MAPPING.keys())
    if name not in known:
        hint = nearest(name, known) if isinstance(name, str) else ""
        raise InputError(
            f"{source}: expected a model_type that transformers {__version__} knows, got {name!r}{hint}"
        )


def explained(error: Exception, what: str, name: str) -> InputError:
    """The error of transformers in one line. what: "the configuration" and the like."""
    if _UNREACHABLE in str(error):
        return InputError(
            f"expected a model's folder or its name on the Hugging Face hub, got {name}: there is no such folder, "
            "the hub cannot be reached, and no copy was kept of an earlier download"
        )
    if "trust_remote_code" in str(error):
        return InputError(
            f"cannot load {what} of {name}: it needs code of its own, which is not run from here"
        )
    if "Weights only load failed" in str(error) and "Unsupported" in str(error):
        return InputError(
            f"cannot load {what} of {name}: its pickle needs code of its own, which is not run from here; "
            "expected safetensors"
        )
    if "instantiate the backend tokenizer" in str(error):
        return InputError(
            f"cannot load {what} of {name}: expected its vocabulary in tokenizer.json, or in the files of a slow "
            "tokenizer with sentencepiece or tiktoken installed, got neither"
        )
    if type(error).__name__ in _DAMAGED or "zip archive" in str(error):
        return InputError(f"cannot load {what} of {name}: a file is damaged or cut short: {one_line(error)}")
    return InputError(f"cannot load {what} of {name}: {one_line(error)}")


def adapter_on_the_hub(name: str, revision: str | None, error: Exception) -> InputError | None:
    """The error for a name on the hub that is an adapter; None for anything else.

    error: why its configuration could not be loaded. A hub that could not be reached is not asked again.
    """
    from transformers.utils import find_adapter_config_file

    if _UNREACHABLE in str(error):
        return None
    try:
        found = find_adapter_config_file(name, revision=revision)
    except OSError:  # as for the configuration: no such name, no such revision
        return None
    return None if found is None else InputError(f"{name} {_is_an_adapter(_base_of(Path(found)))}")


def _base_of(adapter: Path) -> str | None:
    """The base model that the configuration of an adapter names."""
    try:
        found = json.loads(adapter.read_text(encoding="utf-8"))
        return found.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):  # unreadable, no JSON, no object
        return None


def _is_an_adapter(base: str | None) -> str:
    whole = f"or give its base model, {base}" if base else "or give its base model"
    return (
        "is an adapter (LoRA or the like), not a whole model: save the merged model "
        f"(merge_and_unload, then save_pretrained) and give that, {whole}"
    )
