"""Configurations, tokenizers and models of the Hugging Face hub or a local folder; every failure is one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def locate(name: str) -> str:
    """The path of a local folder, else the name on the hub. Raises InputError for a path that does not exist."""
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.exists():
        raise InputError(
            f"expected a model's name on the Hugging Face hub or its folder, got {name}: no such folder"
        )
    return name


def load_config(place: str, name: str | None = None) -> PretrainedConfig:
    """The configuration at a place of `locate`. name: what an error calls it; the place itself if None."""
    from transformers import AutoConfig

    with _loading("the configuration", name or place):
        return AutoConfig.from_pretrained(place)


def config_of_numbers(numbers: dict[str, Any], source: str) -> PretrainedConfig:
    """The configuration of the class that `model_type` names; the class fills in what the numbers leave out."""
    from transformers import AutoConfig

    with _loading("the configuration", source):
        return AutoConfig.for_model(**numbers)


def load_tokenizer(place: str) -> PreTrainedTokenizerBase:
    """The tokenizer at a place of `locate`. Raises InputError for a folder that has none."""
    from transformers import AutoTokenizer

    with _loading("the tokenizer", place):
        tokenizer = AutoTokenizer.from_pretrained(place)
    # If its files are missing, transformers makes an empty tokenizer of the right class and raises nothing.
    files = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    folder = Path(place)
    if (
        tokenizer.vocab_files_names
        and folder.is_dir()
        and not any((folder / file).exists() for file in files)
    ):
        raise InputError(
            f"expected a tokenizer in the folder {place}, got none of {', '.join(sorted(files))}"
        )
    return tokenizer


def load_model(place: str, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model in the class that its checkpoint was saved from: causal, masked, or without a head."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    saved = (config.architectures or [""])[0]
    loader: Any = transformers.AutoModel
    if saved == auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type):
        loader = transformers.AutoModelForCausalLM
    elif saved == auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(config.model_type):
        loader = transformers.AutoModelForMaskedLM
    with _loading("the model", place):
        model, info = loader.from_pretrained(place, dtype=dtype, output_loading_info=True)
    missing = [key for key in info["missing_keys"] if "attention" in key or "attn" in key]
    if missing:
        raise InputError(
            f"expected the attention weights of {place}, got a checkpoint without {len(missing)} of them "
            f"({sorted(missing)[0]}, ...)"
        )
    return model.eval()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers without warnings and progress bars; this package reports the errors itself.

    Raises InputError if transformers is not installed.
    """
    try:
        from huggingface_hub.utils import logging as hub
        from transformers.utils import logging
    except ImportError as error:
        raise InputError(
            "this needs transformers, which is not installed: pip install 'hnf-attention[huggingface]'"
        ) from error
    bar = logging.is_progress_bar_enabled()
    levels = [(library, library.get_verbosity()) for library in (logging, hub)]
    logging.disable_progress_bar()
    for library, _ in levels:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, level in levels:
            library.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def one_line(error: Exception) -> str:
    """The first line of an error's message, or its type if the message is empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextmanager
def _loading(what: str, name: str) -> Iterator[None]:
    """Turn what `from_pretrained` raises into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError) as error:
        raise InputError(f"cannot load {what} of {name}: {one_line(error)}") from error
