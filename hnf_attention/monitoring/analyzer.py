"""Analysis after training: run a model on data, then ask what its attention did."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from ..diagnosis import AttentionDiagnosis, diagnose
from ..diagnosis.thresholds import checked_thresholds
from ..instrumentation import Instrumentation, instrument
from ..statistics.heads import Snapshot
from .recorder import Recorder


class AttentionAnalyzer:
    """Measures every attention call of `model` from now on; `diagnose()` judges what it saw.

        analyzer = AttentionAnalyzer(model)
        with torch.no_grad():
            for batch in loader:
                model(batch)
        diagnosis = analyzer.diagnose()

    `mark()` closes a stretch of forward passes (a checkpoint, a data set). Each stretch is one snapshot in
    `history`, numbered from 1, so that the evolution over the stretches can be plotted.
    A stretch holds the forwards under grad if there are any, else the others. One that raised is left out.
    mode, sample, attention_classes: as for `instrument`, with its errors. "probe" leaves the model's outputs
        bit-identical.
    thresholds: as for `AttentionStabilityMonitor`, with its errors. Use `restore()` or a `with` block to end it.
    """

    def __init__(
        self,
        model: nn.Module,
        mode: str = "probe",
        sample: int | None = None,
        *,
        attention_classes: Iterable[str | type[nn.Module]] = (),
        thresholds: Mapping[str, float] | None = None,
    ):
        self._thresholds = checked_thresholds(thresholds)
        self.instrumentation: Instrumentation = instrument(
            model, mode=mode, sample=sample, attention_classes=attention_classes, holder=self
        )
        try:
            self._recorder = Recorder(self.instrumentation, log_every=1)
        except BaseException:
            self.instrumentation.restore()
            raise

    def __repr__(self) -> str:
        layers = len(self.instrumentation.coverage.measured)
        return f"AttentionAnalyzer of {layers} measured layers: {len(self.history)} snapshots"

    @property
    def history(self) -> Sequence[Snapshot]:
        """Snapshots so far, oldest first."""
        return self._recorder.history

    def mark(self) -> Snapshot:
        """Close the stretch since the last mark. Raises RuntimeError if no attention was measured in it."""
        self._recorder.advance()
        return self.history[-1]

    def diagnose(self) -> AttentionDiagnosis:
        """Mark, and judge. Without new forward passes the last stretch is judged again.

        Raises RuntimeError if no attention was measured at all; it names what was reached and what was not.
        """
        if self._recorder.pending or not self.history:
            self.mark()
        return diagnose(self.history, self.instrumentation.coverage, self._thresholds)

    def restore(self) -> None:
        """End the measuring; the model is as it was. What was recorded can still be diagnosed."""
        self.instrumentation.restore()

    def __enter__(self) -> AttentionAnalyzer:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()
