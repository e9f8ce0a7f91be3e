"""The analysis of a Hugging Face language model on a text: run it, measured, and judge its attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..diagnosis import AttentionDiagnosis
from ..errors import InputError
from ..instrumentation import Coverage
from ..monitoring.analyzer import AttentionAnalyzer
from ..names import display_name
from ..versions import versions
from .loading import Loading, Place, load_config, load_model, load_tokenizer, locate, quiet_transformers
from .messages import one_line
from .progress import Progress
from .texts import SAMPLE, SAMPLE_NAME, read_text, split, window_length

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Analysis:
    """A model's attention on a text.

    tokens: of the whole text; the model ran on `windows` windows of it. window: tokens per window, special
    tokens included. thresholds: those that differ from the table.
    """

    place: Place
    model_class: str
    dtype: str
    device: str
    attn_implementation: str | None
    text: str
    tokens: int
    window: int
    windows: int
    thresholds: Mapping[str, float]
    diagnosis: AttentionDiagnosis = field(repr=False)
    coverage: Coverage = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The JSON document: statistics per layer and head, issues, coverage; NaN and infinities are None."""
        diagnosis = self.diagnosis.to_dict()
        return {
            "schema_version": SCHEMA_VERSION,
            "versions": versions("hnf-attention", "torch", "transformers"),
            "model": {
                "name": self.place.name,
                "revision": self.place.revision,
                "class": self.model_class,
                "dtype": self.dtype,
                "device": self.device,
                "attn_implementation": self.attn_implementation,
            },
            "text": {
                "file": self.text,
                "tokens": self.tokens,
                "window": self.window,
                "windows": self.windows,
            },
            "thresholds": dict(self.thresholds),
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
    text_file: Path | None = None,
    *,
    revision: str | None = None,
    loading: Loading | None = None,
    window: int | None = None,
    batch_size: int = 8,
    max_windows: int | None = None,
    thresholds: Mapping[str, float] | None = None,
    progress: Progress = lambda doing, done, total: None,
) -> Analysis:
    """Run a text through a causal or masked language model, window by window, and judge its attention.

    name: on the Hugging Face hub, or a local folder with model and tokenizer.
    text_file: None takes the built-in text.
    revision: branch, tag or commit of a name on the hub.
    loading: None loads fp32 weights on the CPU.
    window: tokens per window, special tokens included; None takes the model's own length, at most
        `texts.DEFAULT_WINDOW`.
    batch_size: windows that run at once.
    max_windows: the rest of the text is left out.
    thresholds: as `read_thresholds` gives them; the table's apply to the rest.

    Raises InputError, with a message of one line, for whatever the user can put right.
    """
    text = read_text(text_file or SAMPLE)
    loading = loading or Loading()
    with quiet_transformers():
        place = locate(name, revision)
        progress("loading the configuration", None, None)
        config = load_config(place)
        check_language_model(config, place)
        progress("loading the tokenizer", None, None)
        tokenizer = load_tokenizer(place)
        window = window_length(config, tokenizer, str(place), window)
        windows, tokens = split(tokenizer, text, window, str(text_file or SAMPLE_NAME))
        progress("loading the model", None, None)
        model = load_model(place, config, loading)
        check_vocabulary(model, windows, place)
        if max_windows is not None:
            windows = windows[:max_windows]
        with AttentionAnalyzer(model, thresholds=thresholds) as analyzer:
            _run(model, windows, batch_size, progress)
            coverage = analyzer.instrumentation.coverage
            if not coverage.measured:
                reasons = [f"{display_name(layer)}: {why}" for layer, why in coverage.not_measured.items()]
                why = reasons[0] if reasons else "it has no module that is known as attention"
                raise InputError(f"no attention of {place} ({type(model).__name__}) can be measured: {why}")
            diagnosis = analyzer.diagnose()
    return Analysis(
        place=place,
        model_class=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        device=loading.device_map or str(loading.device),
        attn_implementation=loading.attn_implementation,
        text=text_file.name if text_file else SAMPLE_NAME,
        tokens=tokens,
        window=window,
        windows=len(windows),
        thresholds=thresholds or {},
        diagnosis=diagnosis,
        coverage=coverage,
    )


def check_language_model(config: PretrainedConfig, place: Place) -> None:
    """Raise InputError for what is no causal or masked language model."""
    expected = "expected a causal or masked language model, got"
    if config.is_encoder_decoder:
        raise InputError(f"{expected} the encoder-decoder {place} ({config.model_type})")
    if getattr(config.get_text_config(), "vocab_size", None) is None:
        raise InputError(f"{expected} {place} ({config.model_type}), which has no vocabulary")


def check_vocabulary(model: PreTrainedModel, windows: Tensor, place: Place) -> None:
    """Refuse token ids that the model does not have. On a GPU they would end the process."""
    embeddings, largest = model.get_input_embeddings(), int(windows.max())
    if isinstance(embeddings, nn.Embedding) and largest >= embeddings.num_embeddings:
        raise InputError(
            f"expected a tokenizer that fits the model of {place}, got the token id {largest} for a vocabulary of "
            f"{embeddings.num_embeddings}"
        )


@torch.inference_mode()
def _run(model: PreTrainedModel, windows: Tensor, batch_size: int, progress: Progress) -> None:
    body = model.base_model  # without the head: its logits would be by far the largest tensor
    options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    progress("windows", 0, len(windows))
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size].to(model.device)
        try:
            body(input_ids=batch, attention_mask=torch.ones_like(batch), **options)
        except (RuntimeError, IndexError, TypeError, ValueError, ImportError) as error:
            raise InputError(
                f"{type(model).__name__} cannot run {batch.shape[0]} windows of {batch.shape[1]} tokens: "
                f"{type(error).__name__}: {one_line(error)}"
            ) from error
        progress("windows", min(start + batch_size, len(windows)), len(windows))
