"""A monitor beside other people's tools: writers for trackers, and callbacks for trainers.

Writers, for `AttentionStabilityMonitor(model, writers=[...])`: `JSONLWriter`, `TensorBoardWriter`, `WandbWriter`,
`MLflowWriter`, `TrackioWriter`. For its `on_alert`: `WebhookAlert`, `CommandAlert`.
`AttentionStabilityCallback` is for the Hugging Face `Trainer`; Lightning's has the same name in
`hnf_attention.integrations.lightning`. A tool's package is imported when its name here is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .alerts import CommandAlert, WebhookAlert
    from .huggingface import AttentionStabilityCallback
    from .jsonl import JSONLLog, JSONLWriter, read_jsonl
    from .mlflow import MLflowWriter
    from .tensorboard import TensorBoardWriter
    from .trackio import TrackioWriter
    from .wandb import WandbWriter

__all__ = [
    "AttentionStabilityCallback",
    "CommandAlert",
    "JSONLLog",
    "JSONLWriter",
    "MLflowWriter",
    "TensorBoardWriter",
    "TrackioWriter",
    "WandbWriter",
    "WebhookAlert",
    "read_jsonl",
]
_HOMES = {
    "AttentionStabilityCallback": "huggingface",
    "CommandAlert": "alerts",
    "JSONLLog": "jsonl",
    "JSONLWriter": "jsonl",
    "MLflowWriter": "mlflow",
    "TensorBoardWriter": "tensorboard",
    "TrackioWriter": "trackio",
    "WandbWriter": "wandb",
    "WebhookAlert": "alerts",
    "read_jsonl": "jsonl",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
