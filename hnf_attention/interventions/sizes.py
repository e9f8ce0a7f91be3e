"""How large the scores of every head were since the last look, exactly, without waiting for the device."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..engine.sizes import Raised, clip_factors, extreme_scores, product_options, sizes_of_rows
from ..instrumentation import instrument
from ..reference.options import Options

if TYPE_CHECKING:
    from ..instrumentation.keeping import KeptForward
    from ..instrumentation.measurement import Measurement

MEASURES = ("range", "max_logit")


def _has_more(options: Options) -> bool:
    """Whether scores have parts beside q.k that change their size."""
    mask = options.attn_mask
    return options.softcap is not None or (mask is not None and mask.is_floating_point())


#: The most steps that a layer is left alone.
MOST_REST = 7
#: A layer is calm if its bound, grown twice more by what it grew by at most of late, stays below half of the threshold.
CALM_LOOKS = 8  # bounds that were read, at least
CALM_GROWTH = 1.25  # in a step, at least: what batches differ by
_FORGET = 0.9  # of a growth, what is left of it a step later
_MOST_GROWTH = 1e6  # so that it is forgotten
_LATE = 2  # steps; a bound that is older tells nothing of the next one


class LayerSizes:
    """One layer. largest: (H,) fp32 on its device, -inf for nothing yet. bound: of its size, as last read, nats.

    top: the largest bound since the last step, on the device. rest: for how many steps the layer is left alone.
    seen: whether a call was taken in since the last step. kept: whether its calls are kept until the forward ends.
    clipped: how many calls since the last step were taken in by their own forward, and not yet met among the kept ones.
    """

    def __init__(self, heads: int, device: torch.device):
        self.begin(heads, device)

    def begin(self, heads: int, device: torch.device) -> None:
        """Know nothing of the layer."""
        with torch.inference_mode(False):
            self.largest = torch.full((heads,), -torch.inf, dtype=torch.float32, device=device)
            self.top = torch.full((), -torch.inf, dtype=torch.float32, device=device)
        self.bound = float("inf")
        self.rest = self.clipped = 0
        self.seen = self.kept = False
        self._looks, self._age, self._growth = 0, 0, 1.0

    def calm(self, threshold: float) -> bool:
        """Whether no head is expected to pass the threshold at the next step, so that a look after it is enough.

        It changes between steps alone.
        """
        expected = self.bound * max(self._growth, CALM_GROWTH) ** 2
        known = self.kept and self._looks >= CALM_LOOKS and self._age <= _LATE
        return known and expected < threshold / 2

    def raise_to(self, sizes: Tensor) -> None:
        """Take in the sizes of a call."""
        self.seen = True
        torch.maximum(self.largest, sizes, out=self.largest)

    @torch.no_grad()
    def take_in(
        self,
        query: Tensor,
        key: Tensor,
        options: Options,
        left_out: Tensor | None,
        measure: str,
        threshold: float,
    ) -> Tensor:
        """Take in a call. Returns the factors (H,) that bring its heads down to the threshold, 1 for heads within it.

        Sizes are exact where they pass the threshold, else exact or upper bounds. An empty call has no scores.
        """
        if query.numel() == 0 or key.numel() == 0:
            return torch.ones_like(self.largest)
        self.seen = True
        # This bound changes between steps alone: the second forward of a checkpoint goes the way of the first.
        exact, raised = self.bound >= threshold / 2, Raised(self.top, self.largest)
        given = query.detach(), key.detach(), options, left_out, raised
        return clip_factors(*given, measure=measure, threshold=threshold, exact=exact)[1]

    def restart(self) -> None:
        """Begin anew, after a step."""
        self.rest = max(0, self.rest - 1)
        self._age += 1
        self.clipped = 0
        if self.seen:
            self.largest.fill_(-torch.inf)
            self.top.fill_(-torch.inf)
            self.seen = False

    def note(self, bound: float, threshold: float) -> None:
        """Take in a bound that was read, and say for how long doubling keeps the layer below half of the limit."""
        if self.bound < math.inf:
            grew = bound / self.bound if self.bound else math.inf
            kept = 1.0 + _FORGET * (self._growth - 1.0)
            self._growth = min(max(grew if bound else 1.0, kept), _MOST_GROWTH)
        self._looks += 1
        self._age, self.bound = 0, bound
        below = threshold / 2 / bound if bound > 0 else float("inf")
        self.rest = min(MOST_REST, int(math.log2(below))) if 1 <= below < float("inf") else 0


class _Reading:
    """Numbers of the device on their way to the host, which never waits for them."""

    def __init__(self, layers: Sequence[LayerSizes], threshold: float):
        self._layers, self._threshold = layers, threshold
        tops = torch.stack([layer.top for layer in layers])
        self._event = None
        if tops.is_cuda:
            self._numbers = torch.empty(len(layers), dtype=tops.dtype, pin_memory=True)
            self._numbers.copy_(tops, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tops.device))
        else:
            self._numbers = tops

    def arrived(self) -> bool:
        """Whether the numbers are here; the layers have them then."""
        if self._event is not None and not self._event.query():
            return False
        for layer, number in zip(self._layers, self._numbers.tolist()):
            if number != -torch.inf:
                layer.note(math.inf if math.isnan(number) else number, self._threshold)
        return True


class ScoreSizes:
    """Measures the training forwards of a model: exactly where a size may pass `threshold`, else by a bound.

    The model's calls are kept until its forward ends, as `AttentionStabilityMonitor` keeps them between log steps.
    Calls that cannot be kept, such as those of a compiled graph or of a written-out softmax, are probed one by one.

    The bound reads q and k once. Where a layer's was below half of the threshold at the step before, it stands for the
    sizes. Should it pass the threshold within that one step, it is taken for the size. Of other layers, the heads whose
    bound passes the threshold are measured exactly, by all their scores; for their other heads the bound stands. A
    layer that is further below is left alone for as many steps, at most MOST_REST, as it takes to reach half of the
    threshold by doubling at each step.

    Forwards that clip themselves look at their sizes, and are not looked at again.

    layers: the sizes since `restart`, by layer. measure: "range" or "max_logit", see `QKClip`.
    holder: as for `instrument`.
    """

    def __init__(self, model: nn.Module, threshold: float, measure: str, holder: Any):
        self.layers: dict[str, LayerSizes] = {}
        self._threshold, self._measure = threshold, measure
        self._lock = threading.Lock()
        self._kept: set[str] = set()
        self._measured: set[str] = set()
        self._readings: dict[torch.device, _Reading] = {}
        #: Layers whose own calls take in their sizes: see `ClipNow`.
        self.within: set[str] = set()
        self.handle = instrument(model, mode="probe", holder=holder)
        self.handle.on_measure = self._on_measure
        self.handle.on_kept = self._on_kept
        self.handle.keeping = True  # and measuring, until it is known which layers are kept

    def restart(self) -> None:
        """Begin anew, after a step."""
        by_device: dict[torch.device, list[LayerSizes]] = {}
        for layer in self.layers.values():
            if layer.seen:
                by_device.setdefault(layer.top.device, []).append(layer)
        for device, layers in by_device.items():
            reading = self._readings.get(device)
            if reading is None or reading.arrived():
                self._readings[device] = _Reading(layers, self._threshold)
        for layer in self.layers.values():
            layer.restart()
        if self._measured:
            # Two ways of measuring serve to find out which one reaches every layer; one of them is enough.
            every_one_is_kept = self._measured <= self._kept
            self.handle.measuring = not every_one_is_kept
            self.handle.keeping = every_one_is_kept
            for name, layer in self.layers.items():
                layer.kept = every_one_is_kept and name in self._kept

    def restore(self) -> None:
        """End the measuring."""
        self.handle.restore()

    def _layer(self, name: str, heads: int, device: torch.device) -> LayerSizes:
        known = self.layers.get(name)
        if known is None:
            known = self.layers[name] = LayerSizes(heads, device)
        elif len(known.largest) != heads or known.largest.device != device:
            known.begin(heads, device)  # the same object, which the layer's own forwards know
        return known

    def expect(self, name: str, heads: int, device: torch.device) -> None:
        """Have a layer that no forward here has shown yet."""
        with self._lock:
            self._layer(name, heads, device)

    @torch.no_grad()
    def _on_kept(self, kept: KeptForward) -> None:
        if not kept.forward.training:
            return
        with self._lock:
            if not self.within:
                self._readings = {device: x for device, x in self._readings.items() if not x.arrived()}
            for call, (query, key, _, _) in zip(kept.calls, kept.tensors):
                self._kept.add(call.layer)
                layer = self._layer(call.layer, call.heads, call.device)
                if layer.clipped:
                    layer.clipped -= 1
                    continue
                if self.handle.measuring and call.layer in self._measured:
                    continue
                if call.layer in self.within or layer.rest == 0:
                    given = query, key, call.options, call.left_out
                    layer.take_in(*given, self._measure, self._threshold)

    @torch.no_grad()
    def _on_measure(self, measurement: Measurement) -> None:
        if measurement.forward is not None and not measurement.forward.training:
            return
        options, rows = measurement.options, measurement.rows
        query, key = measurement.query, measurement.key
        with self._lock:
            self._measured.add(measurement.layer)
            layer = self._layer(measurement.layer, rows.lse.shape[1], rows.lse.device)
            left_out = measurement.context.left_out
            if measurement.beside is not None:
                left_out = measurement.beside.left_out
            elif left_out is not None:
                left_out = left_out[:, None]
            extremes = rows.max_logit, rows.min_logit
            if options is not None and _has_more(options) and query is not None and key is not None:
                extremes = extreme_scores(query, key, product_options(options))
            layer.raise_to(sizes_of_rows(*extremes, left_out, self._measure))
