"""Configurations, tokenizers and models of the Hugging Face hub or a local folder; every failure is one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError
from ..precheck.configuration import refuse_depth
from .failures import adapter_on_the_hub, check_folder, check_model_type, check_tokenizer, explained
from .paths import is_file, is_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Place:
    """Where a model lies: a local folder, or a name on the hub and its revision (None is the newest)."""

    name: str
    revision: str | None = None
    is_folder: bool = False

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name} at revision {self.revision}"


@dataclass(frozen=True)
class Loading:
    """How a model is loaded.

    dtype: of its weights; "auto" takes the checkpoint's. attn_implementation: None takes the model's own.
    device: of the whole model. device_map: spreads it over devices instead, as accelerate defines it.
    """

    dtype: torch.dtype | str = torch.float32
    attn_implementation: str | None = None
    device: torch.device = torch.device("cpu")
    device_map: str | None = None


def locate(name: str, revision: str | None = None) -> Place:
    """The local folder of that name, else the name on the hub.

    Raises InputError for a file, for a path that does not exist, and for a revision of a folder.
    """
    path = Path(name).expanduser()
    if name and is_folder(path):
        if revision is not None:
            raise InputError(f"expected --revision for a name on the Hugging Face hub, got the folder {name}")
        return Place(str(path), is_folder=True)
    expected = "expected a model's name on the Hugging Face hub or its folder, got"
    if is_file(path):
        raise InputError(f"{expected} the file {name}: give the folder that holds it")
    if not name or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise InputError(f"{expected} {name or 'an empty name'}: no such folder")
    return Place(name, revision)


def load_config(place: Place) -> PretrainedConfig:
    """The configuration at a place. Raises InputError for a folder without one, and for an adapter."""
    from transformers import AutoConfig

    if place.is_folder:
        check_folder(Path(place.name))
    try:
        return AutoConfig.from_pretrained(place.name, revision=place.revision, trust_remote_code=False)
    except Exception as error:
        adapter = None if place.is_folder else adapter_on_the_hub(place.name, place.revision, error)
        raise adapter or explained(error, "the configuration", str(place)) from error


def config_of_numbers(numbers: dict[str, Any], source: str) -> PretrainedConfig:
    """The configuration of the class that `model_type` names; the class fills in what the numbers leave out."""
    from transformers import AutoConfig

    check_model_type(numbers, source)
    try:
        refuse_depth(numbers)
    except ValueError as error:
        raise InputError(f"{source}: {error}") from error
    with _loading("the configuration", source):
        return AutoConfig.for_model(**numbers)


def load_tokenizer(place: Place) -> PreTrainedTokenizerBase:
    """The tokenizer at a place. Raises InputError for a folder that has none."""
    from transformers import AutoTokenizer

    if place.is_folder:
        check_tokenizer(Path(place.name))
    with _loading("the tokenizer", str(place)):
        tokenizer = AutoTokenizer.from_pretrained(
            place.name, revision=place.revision, trust_remote_code=False
        )
    # If its files are missing, transformers makes an empty tokenizer of the right class and raises nothing.
    files = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    folder = Path(place.name)
    if (
        tokenizer.vocab_files_names
        and place.is_folder
        and not any((folder / file).exists() for file in files)
    ):
        raise InputError(
            f"expected a tokenizer in the folder {place}, got none of {', '.join(sorted(files))}"
        )
    return tokenizer


def load_model(place: Place, config: PretrainedConfig, how: Loading) -> PreTrainedModel:
    """The model in the class that its checkpoint was saved from: causal, masked, or without a head."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    saved = (config.architectures or [""])[0]
    loader: Any = transformers.AutoModel
    if saved == auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type):
        loader = transformers.AutoModelForCausalLM
    elif saved == auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(config.model_type):
        loader = transformers.AutoModelForMaskedLM
    chosen: dict[str, Any] = {"revision": place.revision, "dtype": how.dtype}
    # Given only if chosen: None would mean that nothing is chosen to some versions, and "no device map" to others.
    chosen |= {
        name: value
        for name in ("attn_implementation", "device_map")
        if (value := getattr(how, name)) is not None
    }
    with _loading("the model", str(place)):
        model, info = loader.from_pretrained(
            place.name, output_loading_info=True, trust_remote_code=False, **chosen
        )
    missing = [key for key in info["missing_keys"] if "attention" in key or "attn" in key]
    if missing:
        raise InputError(
            f"expected the attention weights of {place}, got a checkpoint without {len(missing)} of them "
            f"({sorted(missing)[0]}, ...)"
        )
    if how.device_map is None:
        with _loading("the model", str(place)):
            model.to(how.device)
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


@contextmanager
def _loading(what: str, name: str) -> Iterator[None]:
    """Turn what transformers raises into one line. Of its many libraries, each has errors of its own."""
    try:
        yield
    except Exception as error:
        raise explained(error, what, name) from error
