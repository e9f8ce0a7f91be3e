"""Attention that measures itself: exact softmax statistics, diagnosis, intervention.

A public name is imported when it is first used: `import hnf_attention` alone does not import torch.
"""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING

from .versions import __version__ as __version__

if not (_Path(__file__).parent / "kernels").is_dir():  # source checkout: kernels/ lies beside the package
    __path__.append(str(_Path(__file__).parent.parent))

if TYPE_CHECKING:
    from .diagnosis import AttentionDiagnosis, StabilityIssue
    from .diagnosis.triage import NonFiniteTrace
    from .engine.api import attention, attention_stats
    from .instrumentation import (
        CallDescription,
        Instrumentation,
        Unmeasurable,
        instrument,
        observe_blocks,
        register_interceptor,
        restore,
    )
    from .interventions import apply_intervention
    from .monitoring.analyzer import AttentionAnalyzer
    from .monitoring.monitor import AttentionStabilityMonitor
    from .monitoring.process_groups import ProcessGroups
    from .nn.multihead import MultiheadAttention
    from .precheck import StabilityRegion, StabilityReport, check_attention_stability, stability_region
    from .replay import trace_non_finite
    from .statistics.heads import HeadStats
    from .statistics.merge import merge_attention
    from .statistics.rows import RowStats

    Ranks = ProcessGroups  # its name in version 0.1
else:
    _HOMES = {  # module -> the public names that it defines; as above, which a test compares
        ".diagnosis": ("AttentionDiagnosis", "StabilityIssue"),
        ".engine.api": ("attention", "attention_stats"),
        ".instrumentation": (
            "CallDescription",
            "Instrumentation",
            "Unmeasurable",
            "instrument",
            "observe_blocks",
            "register_interceptor",
            "restore",
        ),
        ".interventions": ("apply_intervention",),
        ".monitoring.analyzer": ("AttentionAnalyzer",),
        ".monitoring.monitor": ("AttentionStabilityMonitor",),
        ".monitoring.process_groups": ("ProcessGroups",),
        ".nn.multihead": ("MultiheadAttention",),
        ".precheck": (
            "StabilityRegion",
            "StabilityReport",
            "check_attention_stability",
            "stability_region",
        ),
        ".diagnosis.triage": ("NonFiniteTrace",),
        ".replay": ("trace_non_finite",),
        ".statistics.heads": ("HeadStats",),
        ".statistics.merge": ("merge_attention",),
        ".statistics.rows": ("RowStats",),
    }
    _HOME = {name: module for module, names in _HOMES.items() for name in names}
    _ALIASES = {"Ranks": "ProcessGroups"}
    _PACKAGES = (
        "integrations",
        "nn",
        "theory",
    )  # public, too: `hnf_attention.theory` needs no import of its own

    def __getattr__(name: str) -> object:
        if name in _PACKAGES:
            return _import_module(f".{name}", __name__)
        defined = _ALIASES.get(name, name)
        if defined not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(_import_module(_HOME[defined], __name__), defined)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "AttentionAnalyzer",
    "AttentionDiagnosis",
    "AttentionStabilityMonitor",
    "CallDescription",
    "HeadStats",
    "Instrumentation",
    "MultiheadAttention",
    "NonFiniteTrace",
    "ProcessGroups",
    "Ranks",
    "RowStats",
    "StabilityIssue",
    "StabilityRegion",
    "StabilityReport",
    "Unmeasurable",
    "apply_intervention",
    "attention",
    "attention_stats",
    "check_attention_stability",
    "instrument",
    "merge_attention",
    "observe_blocks",
    "register_interceptor",
    "restore",
    "stability_region",
    "trace_non_finite",
]
