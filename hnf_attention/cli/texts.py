"""A text as windows of token ids."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InputError
from ..statistics.fields import JUDGED_MIN_KEYS

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# Tokens: a model made for 128k tokens runs on that many only if asked to.
DEFAULT_WINDOW = 1024
# The names under which configurations keep the longest sequence that a model can run; the first one found counts.
_LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")
# A tokenizer without a limit of its own reports a huge number.
_NO_LIMIT = 10**9


# The first three chapters of Lewis Carroll's Alice's Adventures in Wonderland (1865), which is in the public domain.
SAMPLE = Path(__file__).with_name("sample_text.txt")
SAMPLE_NAME = "the built-in text"


def read_text(path: Path) -> str:
    """The UTF-8 text of a file. Raises InputError for a file that is unreadable, binary or blank."""
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


def window_length(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, name: str, wanted: int | None
) -> int:
    """Tokens per window: `wanted`, or the model's own length up to DEFAULT_WINDOW if None.

    Raises InputError for more tokens than the model `name` can run, for too few to judge, and if the model has no
    length of its own and none is wanted.
    """
    text_config = config.get_text_config()
    configured = (getattr(text_config, key, None) for key in _LENGTHS)
    lengths = [length for length in configured if isinstance(length, int) and length > 0][:1]
    if tokenizer.model_max_length < _NO_LIMIT:
        lengths.append(tokenizer.model_max_length)
    longest = min(lengths, default=None)
    if wanted is None:
        if longest is None:
            raise InputError(f"expected a length in the configuration of {name}, got none; give --window N")
        return min(longest, DEFAULT_WINDOW)
    if longest is not None and wanted > longest:
        raise InputError(f"expected --window of at most {longest}, the length of {name}, got {wanted}")
    if wanted < JUDGED_MIN_KEYS:
        raise InputError(f"expected --window of at least {JUDGED_MIN_KEYS}, got {wanted}")
    return wanted


def split(tokenizer: PreTrainedTokenizerBase, text: str, window: int, source: str) -> tuple[Tensor, int]:
    """The text as full windows of token ids, (windows, window) int64, and how many tokens it has.

    Each window gets the special tokens that the tokenizer puts around a text. A last, shorter window is left out.
    source: what an error calls the text.
    Raises InputError if the text does not fill one window, or if the tokenizer does not know most of it.
    """
    plain: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    unknown = plain.count(tokenizer.unk_token_id) if tokenizer.unk_token_id is not None else 0
    if not plain or 2 * unknown > len(plain):
        raise InputError(
            f"expected a tokenizer that knows {source}, got {unknown} unknown of {len(plain)} tokens; "
            "give --text FILE with a text like those that the model was made for"
        )
    before, after = _special_tokens(tokenizer)
    content = window - len(before) - len(after)
    if len(plain) < content:
        raise InputError(
            f"expected at least {content} tokens in {source} to fill one window of {window}, got {len(plain)}; "
            "give a longer --text or a smaller --window"
        )
    starts = range(0, len(plain) - content + 1, content)
    return torch.tensor([[*before, *plain[i : i + content], *after] for i in starts]), len(plain)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    sample = "a"
    plain = tokenizer(sample, add_special_tokens=False)["input_ids"]
    full = tokenizer(sample)["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []
