"""The analysis of a Hugging Face language model on a text: run it, measured, and judge its attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..diagnosis import AttentionDiagnosis
from ..errors import InputError
from ..instrumentation import Coverage
from ..monitoring.analyzer import AttentionAnalyzer
from ..names import display_name
from ..versions import versions
from .loading import load_config, load_model, load_tokenizer, locate, one_line, quiet_transformers
from .texts import read_text, split, window_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCHEMA_VERSION = 1
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Analysis:
    """A model's attention on a text.

    tokens: of the whole text; the model ran on `windows` windows of it. window: tokens per window, special
    tokens included.
    """

    model: str
    model_class: str
    dtype: str
    device: str
    text: str
    tokens: int
    window: int
    windows: int
    diagnosis: AttentionDiagnosis = field(repr=False)
    coverage: Coverage = field(repr=False)

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
    progress: Progress = lambda done, total: None,
) -> Analysis:
    """Run a text through a causal or masked language model, window by window, and judge its attention.

    name: on the Hugging Face hub, or a local folder with model and tokenizer.
    window: tokens per window, special tokens included; None takes the model's own length, at most
        `texts.DEFAULT_WINDOW`.
    batch_size: windows that run at once.
    max_windows: the rest of the text is left out.
    progress: called with (windows done, windows in all).

    Raises InputError, with a message of one line, for whatever the user can put right.
    """
    text = read_text(text_file)
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("expected a CUDA device for --device cuda, got none")
    with quiet_transformers():
        place = locate(name)
        config = load_config(place)
        if config.is_encoder_decoder:
            raise InputError(
                f"expected a causal or masked language model, got the encoder-decoder {place} ({config.model_type})"
            )
        tokenizer = load_tokenizer(place)
        window = window_length(config, tokenizer, place, window)
        windows, tokens = split(tokenizer, text, window, text_file)
        model = load_model(place, config, getattr(torch, dtype))
        model.to(torch.device(device))  # type: ignore[arg-type]  # transformers' decorator hides `self`
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


@torch.inference_mode()
def _run(model: PreTrainedModel, windows: Tensor, batch_size: int, device: str, progress: Progress) -> None:
    body = model.base_model  # without the head: its logits would be by far the largest tensor
    options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size].to(device)
        try:
            body(input_ids=batch, attention_mask=torch.ones_like(batch), **options)
        except (RuntimeError, IndexError, TypeError) as error:
            raise InputError(
                f"{type(model).__name__} cannot run {batch.shape[0]} windows of {batch.shape[1]} tokens: "
                f"{type(error).__name__}: {one_line(error)}"
            ) from error
        progress(min(start + batch_size, len(windows)), len(windows))
