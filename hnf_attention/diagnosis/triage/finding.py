"""What a trace found: where NaN or inf began, why, and what to do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...names import display_name
from ..issue import number_text


@dataclass(frozen=True)
class WideReplay:
    """The same step in a wider format.

    dtype: "float64" or "float32", None if neither could run; reason then says why. finite: whether loss and gradients
    were. largest: the largest |gradient|, or |output| where there is no loss.
    """

    dtype: str | None
    finite: bool | None
    loss: float | None
    largest: float | None
    reason: str = ""

    def __str__(self) -> str:
        if self.dtype is None:
            return f"the step could not be run in a wider format ({self.reason})"
        if not self.finite:
            return f"the same step in {self.dtype} is not finite either"
        loss = "" if self.loss is None else f", with loss {self.loss:.6g}"
        return f"the same step in {self.dtype} is finite{loss}"


@dataclass(frozen=True)
class NonFiniteTrace:
    """Where NaN or inf began in one training step.

    cause: one of `diagnosis.triage.causes.CAUSES`; None if the whole step was finite.
    step: the number of the training step; None if it is not known. phase: "forward", "backward", "loss scaling",
        "gradient clipping" or "optimizer step".
    layer: the attention layer, or another module; None if no module ran the operation. module: the innermost one.
    heads: query heads, () if no head in particular. tensor: which one of the layer. batch, row: of its first number
        that is not finite; None where they are not known.
    operation: of PyTorch, as "aten.bmm.default". dtype: of its result.
    evidence: one sentence with the numbers. suggestion: what to do.
    wide: the same step in a wider format; None if it was not asked for. symptoms: what the user sees of it.
    notes: what limits the answer. reproduction: the folder with it, None if none was asked for.
    """

    cause: str | None
    phase: str | None = None
    layer: str | None = None
    module: str | None = None
    heads: tuple[int, ...] = ()
    tensor: str | None = None
    batch: int | None = None
    row: int | None = None
    operation: str | None = None
    dtype: str | None = None
    evidence: str = ""
    suggestion: str = ""
    wide: WideReplay | None = None
    symptoms: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    step: int | None = None
    reproduction: Path | None = None

    @property
    def found(self) -> bool:
        """Whether anything was not finite."""
        return self.cause is not None

    @property
    def head(self) -> int | None:
        """The head, if it is one."""
        return self.heads[0] if len(self.heads) == 1 else None

    @property
    def where(self) -> str:
        """'layer h.1.attn, head 3, batch 0, row 5, scores, forward, at step 12'."""
        parts = [] if self.layer is None else [f"layer {display_name(self.layer)}"]
        if self.heads:
            parts.append(number_text(list(self.heads)).strip())
        parts += [f"{name} {at}" for name, at in (("batch", self.batch), ("row", self.row)) if at is not None]
        parts += [x for x in (self.tensor, self.phase) if x]
        return ", ".join(parts) + ("" if self.step is None else f", at step {self.step}")

    def __str__(self) -> str:
        if not self.found:
            return "\n".join([self.evidence, *(f"note: {note}" for note in self.notes)])
        lines = [f"{self.cause}: {self.evidence}", f"  where: {self.where}"]
        if self.operation is not None:
            lines.append(f"  operation: {self.operation}, result in {self.dtype}")
        if self.symptoms:
            lines.append(f"  seen in: {_listed(self.symptoms)}")
        if self.wide is not None:
            lines.append(f"  replay: {self.wide}")
        lines.append(f"  -> {self.suggestion}")
        if self.reproduction is not None:
            lines.append(f"  reproduction: {self.reproduction}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """JSON types; NaN and infinities are None."""
        wide = self.wide
        return {
            "found": self.found,
            "cause": self.cause,
            "step": self.step,
            "phase": self.phase,
            "layer": self.layer,
            "module": self.module,
            "heads": list(self.heads),
            "tensor": self.tensor,
            "batch": self.batch,
            "row": self.row,
            "operation": self.operation,
            "dtype": self.dtype,
            "evidence": self.evidence,
            "suggestion": self.suggestion,
            "wide": None
            if wide is None
            else {
                "dtype": wide.dtype,
                "finite": wide.finite,
                "loss": _finite(wide.loss),
                "largest": _finite(wide.largest),
                "reason": wide.reason or None,
            },
            "symptoms": list(self.symptoms),
            "notes": list(self.notes),
            "reproduction": None if self.reproduction is None else str(self.reproduction),
        }


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def _listed(names: tuple[str, ...], most: int = 3) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
