"""What an issue's suggestion is as code."""

from __future__ import annotations

_PROPOSED = """\
from hnf_attention import apply_intervention

intervention = monitor.get_intervention(diagnosis)
if intervention:
    done = apply_intervention(optimizer, intervention)
    print(done.description)
"""
_TRACE = """\
from hnf_attention import trace_non_finite

print(trace_non_finite(model, batch))
"""


def code(issue_type: str, suggestion: str) -> str:
    """Python for what the suggestion asks for, or nothing if it asks to look or to wait."""
    if issue_type == "non_finite":
        return _TRACE
    if suggestion.startswith("apply ") and " if " not in suggestion or "get_intervention" in suggestion:
        return _PROPOSED
    return ""
