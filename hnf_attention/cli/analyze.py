"""Judge the attention of a Hugging Face language model on a text: what `hnf-attention analyze` does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..diagnosis import AttentionDiagnosis
from ..errors import InputError
from ..instrumentation import Coverage
from ..monitoring.analyzer import AttentionAnalyzer
from ..names import display_name
from ..report.versions import versions
from ..statistics.fields import JUDGED_MIN_KEYS

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SCHEMA_VERSION = 1
# A model made for 128k tokens is not run on that many unless asked for.
DEFAULT_WINDOW = 1024
# Where configurations keep the longest sequence a model can run; the first one found counts.
_LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")
# Tokenizers without a limit of their own report a huge number as one.
_NO_LIMIT = 10**9


@dataclass(frozen=True)
class Analysis:
    """A model's attention on a text. tokens: of the whole text; windows * window of them were run."""

    model: str
    model_class: str
    dtype: str
    device: str
    text: str
    tokens: int
    window: int  # tokens per window, special tokens included
    windows: int
    diagnosis: AttentionDiagnosis
    coverage: Coverage

    def to_dict(self) -> dict[str, Any]:
        """The JSON document: statistics per layer and head, issues, coverage; NaN and infinities are None."""
        diagnosis = self.diagnosis.to_dict()
        return {
            "schema_version": SCHEMA_VERSION,
            "versions": versions("hnf-attention", "torch", "transformers"),
            "model": {
                "name": self.model,
                "class": self.model_class,
                "dtype": self.dtype,
                "device": self.device,
            },
            "text": {
                "file": self.text,
                "tokens": self.tokens,
                "window": self.window,
                "windows": self.windows,
            },
            "healthy": diagnosis["healthy"],
            "issues": diagnosis["issues"],
            "layers": diagnosis["layers"],
            "coverage": {
                "measured": dict(self.coverage.measured),
                "not_measured": dict(self.coverage.not_measured),
            },
        }


def analyze(
    name: str,
    text_file: Path,
    *,
    window: int | None = None,
    batch_size: int = 8,
    max_windows: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Analysis:
    """Run a text through a causal or masked language model, window by window, and judge its attention.

    name: on the Hugging Face hub, or a local folder with model and tokenizer.
    window: tokens per window; if None, the model's own length, DEFAULT_WINDOW at most. Special tokens
        are put around each window as the tokenizer does for a text; a last, shorter window is left out.
    progress: called with (windows done, of how many).

    Raises InputError, in one line, for whatever the user can put right.
    """
    text = read_text(text_file)
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("expected a CUDA device for --device cuda, got none")
    with _quiet_transformers():
        place = _locate(name)
        config, tokenizer = _load_tokenizer(place)
        window = _window(config, tokenizer, place, window)
        windows, tokens = split(tokenizer, text, window, text_file)
        model = _load_model(place, config, getattr(torch, dtype)).to(device)
        if max_windows is not None:
            windows = windows[:max_windows]
        with AttentionAnalyzer(model) as analyzer:
            _run(model, windows, batch_size, device, progress)
            coverage = analyzer.instrumentation.coverage
            if not coverage.measured:
                reasons = [f"{display_name(layer)}: {why}" for layer, why in coverage.not_measured.items()]
                why = reasons[0] if reasons else "it has no module that is known as attention"
                raise InputError(f"no attention of {name} ({type(model).__name__}) can be measured: {why}")
            diagnosis = analyzer.diagnose()
    return Analysis(
        model=name,
        model_class=type(model).__name__,
        dtype=dtype,
        device=device,
        text=text_file.name,
        tokens=tokens,
        window=window,
        windows=len(windows),
        diagnosis=diagnosis,
        coverage=coverage,
    )


def read_text(path: Path) -> str:
    """The UTF-8 text of a file. Raises InputError for one that is unreadable, binary or blank."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read the text {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"expected UTF-8 text in {path}, got other bytes at offset {error.start}") from error
    if "\0" in text:
        raise InputError(f"expected text in {path}, got a binary file")
    if not text.strip():
        raise InputError(f"expected some text in {path}, got an empty file")
    return text


def split(tokenizer: PreTrainedTokenizerBase, text: str, window: int, source: Path) -> tuple[Tensor, int]:
    """The text as full windows of token ids, (windows, window) int64, and how many tokens it has.

    Each window gets the special tokens that the tokenizer puts around a text. Raises InputError when
    the text does not fill one window, or when the tokenizer does not know it.
    """
    plain: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    unknown = plain.count(tokenizer.unk_token_id) if tokenizer.unk_token_id is not None else 0
    if not plain or 2 * unknown > len(plain):
        raise InputError(
            f"expected a tokenizer that knows the text {source}, got {unknown} unknown of {len(plain)} tokens"
        )
    before, after = _special_tokens(tokenizer)
    content = window - len(before) - len(after)
    if len(plain) < content:
        raise InputError(
            f"expected at least {content} tokens in {source} to fill one window of {window}, got {len(plain)}; "
            f"give a longer text or a smaller --window"
        )
    starts = range(0, len(plain) - content + 1, content)
    return torch.tensor([[*before, *plain[i : i + content], *after] for i in starts]), len(plain)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens put before and after a text."""
    probe = "a"
    plain = tokenizer(probe, add_special_tokens=False)["input_ids"]
    full = tokenizer(probe)["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []


def _window(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, name: str, wanted: int | None
) -> int:
    """Tokens per window: what the user wants, within what the model can run."""
    text_config = config.get_text_config()
    lengths = [getattr(text_config, key, None) for key in _LENGTHS]
    lengths = [length for length in lengths if isinstance(length, int) and length > 0][:1]
    if tokenizer.model_max_length < _NO_LIMIT:
        lengths.append(tokenizer.model_max_length)
    longest = min(lengths, default=None)
    if wanted is None and longest is None:
        raise InputError(f"expected a length in the configuration of {name}, got none; give --window N")
    if wanted is None:
        return min(longest, DEFAULT_WINDOW)
    if longest is not None and wanted > longest:
        raise InputError(f"expected --window of at most {longest}, the length of {name}, got {wanted}")
    if wanted < JUDGED_MIN_KEYS:
        raise InputError(f"expected --window of at least {JUDGED_MIN_KEYS}, got {wanted}")
    return wanted


def _locate(name: str) -> str:
    """A folder's path, or the name on the hub. Raises InputError for a path that is not there."""
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.exists():
        raise InputError(
            f"expected a model's name on the Hugging Face hub or its folder, got {name}: no such folder"
        )
    return name


def _load_tokenizer(name: str) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    from transformers import AutoConfig, AutoTokenizer

    with _loading("the configuration", name):
        config = AutoConfig.from_pretrained(name)
    if config.is_encoder_decoder:
        raise InputError(
            f"expected a causal or masked language model, got the encoder-decoder {name} ({config.model_type})"
        )
    with _loading("the tokenizer", name):
        tokenizer = AutoTokenizer.from_pretrained(name)
    # Without its files, transformers makes an empty tokenizer of the right class rather than an error.
    files = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    folder = Path(name)
    if (
        tokenizer.vocab_files_names
        and folder.is_dir()
        and not any((folder / file).exists() for file in files)
    ):
        raise InputError(f"expected a tokenizer in the folder {name}, got none of {', '.join(sorted(files))}")
    return config, tokenizer


def _load_model(name: str, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model in the class that its checkpoint was saved from: causal, masked, or without a head."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    saved = (config.architectures or [None])[0]
    if saved == auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type):
        loader = transformers.AutoModelForCausalLM
    elif saved == auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(config.model_type):
        loader = transformers.AutoModelForMaskedLM
    else:
        loader = transformers.AutoModel
    with _loading("the model", name):
        model, info = loader.from_pretrained(name, dtype=dtype, output_loading_info=True)
    missing = [key for key in info["missing_keys"] if "attention" in key or "attn" in key]
    if missing:
        raise InputError(
            f"expected the attention weights of {name}, got a checkpoint without {len(missing)} of them "
            f"({sorted(missing)[0]}, ...)"
        )
    return model.eval()


@torch.inference_mode()
def _run(
    model: PreTrainedModel,
    windows: Tensor,
    batch_size: int,
    device: str,
    progress: Callable[[int, int], None],
) -> None:
    body = model.base_model  # without the head, whose logits would be by far the largest tensor
    options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size].to(device)
        try:
            body(input_ids=batch, attention_mask=torch.ones_like(batch), **options)
        except (RuntimeError, IndexError, TypeError) as error:
            raise InputError(
                f"{type(model).__name__} cannot run {batch.shape[0]} windows of {batch.shape[1]} tokens: "
                f"{type(error).__name__}: {_one_line(error)}"
            ) from error
        progress(min(start + batch_size, len(windows)), len(windows))


@contextmanager
def _loading(what: str, name: str) -> Iterator[None]:
    """Turn what `from_pretrained` raises into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError) as error:
        raise InputError(f"cannot load {what} of {name}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """transformers without warnings and progress bars: what goes wrong is told in our words."""
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
