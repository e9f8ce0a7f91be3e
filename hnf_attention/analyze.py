"""`hnf-attention analyze`: judge the attention of a Hugging Face model on the user's text."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from .analyzer import AttentionAnalyzer
from .diagnosis import AttentionDiagnosis
from .instrument import Coverage
from .report import tables
from .report.versions import versions

SCHEMA_VERSION = 1
# A model made for 128k tokens is not run on that many unless asked for.
LONGEST_DEFAULT_WINDOW = 1024
# Where configurations and tokenizers say how many positions a model has.
_LENGTH_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


class AnalyzeError(ValueError):
    """The model or the text cannot be analysed; the message is one line for the user."""


@dataclass(frozen=True)
class Analysis:
    """What one analysis ran on and found."""

    model: str
    text: str
    tokens: int
    windows: int
    window: int
    diagnosis: AttentionDiagnosis
    coverage: Coverage

    def to_document(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "versions": versions("hnf-attention", "torch", "transformers"),
            "model": self.model,
            "text": {
                "file": self.text,
                "tokens": self.tokens,
                "windows": self.windows,
                "window": self.window,
            },
            "coverage": {"measured": self.coverage.measured, "not_measured": self.coverage.not_measured},
            **self.diagnosis.to_dict(),
        }


def run(options: argparse.Namespace) -> Analysis:
    """Run the command and print its report. Raises AnalyzeError for what the user has to mend."""
    console = Console(stderr=options.json == "-")
    if not console.is_terminal:
        console.width = 110
    analysis = analyze(
        options.model,
        options.text,
        window=options.window,
        batch_size=options.batch_size,
        max_windows=options.max_windows,
        device=options.device,
        dtype=getattr(torch, options.dtype),
    )
    diagnosis = analysis.diagnosis
    title = f"{analysis.model}: {analysis.windows} windows of {analysis.window} tokens from {analysis.text}"
    console.print(tables.layer_table(diagnosis.stats, diagnosis.issues, title))
    console.print(tables.findings(diagnosis.issues))
    for name, why in analysis.coverage.not_measured.items():
        console.print(f"not measured: {name}: {why}", markup=False)
    console.print("verdict: unhealthy" if diagnosis.errors else "verdict: healthy")
    if options.json is not None:
        document = json.dumps(analysis.to_document(), indent=1, allow_nan=False) + "\n"
        if options.json == "-":
            sys.stdout.write(document)
        else:
            try:
                Path(options.json).write_text(document, encoding="utf-8")
            except OSError as error:
                raise AnalyzeError(f"cannot write {options.json}: {error.strerror}") from error
    return analysis


def analyze(
    model_name: str,
    text_path: Path,
    *,
    window: int | None = None,
    batch_size: int = 8,
    max_windows: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Analysis:
    """Run the text through the model in windows of equal length and judge its attention.

    The text's last, incomplete window is left out. Raises AnalyzeError.
    """
    text = _read(text_path)
    if device == "cuda" and not torch.cuda.is_available():
        raise AnalyzeError("--device cuda: PyTorch sees no CUDA card here")
    tokenizer, model = _load(model_name, dtype)
    window = _window(window, model.config, tokenizer)
    special = list(tokenizer("")["input_ids"])
    per_window = window - len(special)
    if per_window < 1:
        raise AnalyzeError(f"--window {window} leaves no room beside {len(special)} special tokens")
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    # Some tokenizers load from a folder that has none of their files, and then know nothing.
    unknown = tokens.count(tokenizer.unk_token_id)
    if 2 * unknown > len(tokens):
        raise AnalyzeError(
            f"cannot load {model_name}: its tokenizer does not know {unknown} of the text's {len(tokens)} tokens; "
            "are the tokenizer's files there?"
        )
    if len(tokens) < per_window:
        raise AnalyzeError(
            f"{text_path} has {len(tokens)} tokens, expected at least one window of {per_window}; "
            f"give a longer text, or --window {max(1, len(tokens) + len(special))} or less"
        )
    windows = _windows(tokens, per_window, special)[:max_windows]
    model.to(device).eval()
    with AttentionAnalyzer(model) as analyzer, torch.no_grad():
        for start in range(0, len(windows), batch_size):
            model(input_ids=windows[start : start + batch_size].to(device))
        try:
            diagnosis = analyzer.diagnose()
        except RuntimeError as error:
            raise AnalyzeError(" ".join(str(error).split())) from error
        coverage = analyzer.instrumentation.coverage
    return Analysis(model_name, text_path.name, len(tokens), len(windows), window, diagnosis, coverage)


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise AnalyzeError(f"{path} is not UTF-8 text") from error
    except OSError as error:
        raise AnalyzeError(f"cannot read {path}: {error.strerror}") from error
    if not text.strip():
        raise AnalyzeError(f"{path} is empty")
    return text


def _load(name: str, dtype: torch.dtype) -> tuple[Any, nn.Module]:
    try:
        import transformers
    except ImportError as error:
        raise AnalyzeError("analyze needs transformers: pip install 'hnf-attention[huggingface]'") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # Loading runs code of many libraries on a user's files; whatever it raises is about those files.
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        if config.is_encoder_decoder:
            raise ValueError("an encoder-decoder; expected a causal or masked language model")
        architecture = " ".join(config.architectures or ())
        if "ForCausalLM" in architecture or "LMHead" in architecture:
            kind = transformers.AutoModelForCausalLM
        elif "ForMaskedLM" in architecture:
            kind = transformers.AutoModelForMaskedLM
        else:
            kind = transformers.AutoModel
        model = kind.from_pretrained(name, dtype=dtype)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AnalyzeError(f"cannot load {name}: {first_line}") from error
    return tokenizer, model


def _window(asked: int | None, config: Any, tokenizer: Any) -> int:
    """Tokens per window: what was asked for, or the model's own length up to a default."""
    lengths = [getattr(config, field, None) for field in _LENGTH_FIELDS]
    lengths = [length for length in [*lengths, tokenizer.model_max_length] if isinstance(length, int)]
    own = min(lengths, default=None)
    if asked is None:
        return min(own or LONGEST_DEFAULT_WINDOW, LONGEST_DEFAULT_WINDOW)
    if own is not None and asked > own:
        raise AnalyzeError(f"--window {asked}: expected at most the model's own {own} tokens")
    return asked


def _windows(tokens: list[int], per_window: int, special: list[int]) -> Tensor:
    """(windows, length) token ids; special tokens stand around each window as around a whole text."""
    count = len(tokens) // per_window
    body = torch.tensor(tokens[: count * per_window]).view(count, per_window)
    before, after = special[: (len(special) + 1) // 2], special[(len(special) + 1) // 2 :]
    edges = [torch.tensor(edge, dtype=body.dtype).expand(count, -1) for edge in (before, after)]
    return torch.cat([edges[0], body, edges[1]], 1)
