"""QK-norm started in a trained model: queries and keys get a fixed length, at first the one that they had on average.

RMS norm over each query and key (Henry et al., arXiv 2010.04245; Dehghani et al., arXiv 2302.05442), with one learned
gain for each head. A gain that is one number commutes with rotary positions, so the norm is applied at the attention
call. Scores then stay within gain_q * gain_k * D * scale.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import dynamo
from ..instrumentation import treating
from ..instrumentation.treated import Call, Treated, interceptors
from ..names import display_name, named_modules, unwrapped
from . import good_states, orders, peers
from . import optimizers as optim
from .gains import Gains, once
from .intervention import check_positive
from .key_weights import KeyWeights
from .layout import QK_NORM
from .normed_call import EPS, KEY, QUERY, QKNorm
from .shards import HeadPart, Spread, own_part

_log = logging.getLogger("hnf_attention")

#: Gains start at no more than this: two such give scores of up to 64 * sqrt(D) nats, which a softmax can still leave.
MOST = 8.0


class QKNormStart:
    """QK-norm on the layers of a model, made by `start_qk_norm`.

    layers: names of the layers that have it. refused: layers that cannot have it, and why.
    started: whether the gains were measured. Until then the model is as it was. listening: whether they still will be.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        layers: Collection[str] | None,
        bounds: tuple[float, float],
        group: Any = None,
    ):
        self.layers: dict[str, nn.Module] = {}
        self.refused: dict[str, str] = {}
        self.started = False
        self._model, self._optimizers, self._wanted = model, optimizers, layers
        self._gains = Gains(max(bounds[0], EPS), bounds[1], group)
        self._names = {module: name for name, module in named_modules(model)}
        self._spreads: dict[str, Spread] = {}
        self._keys: dict[str, KeyWeights] = {}
        self._change = QKNorm()
        self._listening: list[Callable[[], Any]] = []  # what ends it
        self._hooks: list[Callable[[], Any]] = []  # what removes those of the model
        self._at_once = False

    def __repr__(self) -> str:
        waits = "to start in the next forward" if self.listening else "not started"
        state = "started" if self.started else waits
        return f"QKNormStart({len(self.layers)} layers, {len(self.refused)} refused, {state})"

    @property
    def listening(self) -> bool:
        """Whether the next forward of the model is to be measured."""
        return bool(self._listening)

    @property
    def gains(self) -> list[nn.Parameter]:
        """The gains of all layers: of queries and keys by turns."""
        return [module.get_parameter(name) for module in self.layers.values() for name in (QUERY, KEY)]

    def listen(self, at_once: bool) -> None:
        """Measure in the next forward of the model. Raises ValueError if the processes hold different layers.

        at_once: the caller runs that forward, and calls `start` if it has not started anything.
        """
        self._at_once = at_once
        self._gains.check_layers(
            name for module, name in self._names.items() if "att" in name.lower() or orders.holds(module)
        )
        self.spread()
        patches = interceptors(self._model.modules())
        treating.finders.append(self)
        self._listening += [*(patch.release for patch in patches), lambda: treating.finders.remove(self)]
        self._hooks += [
            self._model.register_forward_pre_hook(self._begun).remove,
            self._model.register_forward_hook(self._ended).remove,
            self._model.register_forward_hook(self._failed, always_call=True).remove,
        ]

    def spread(self) -> None:
        """Look how the layers' weights lie over processes: a forward does not show where FSDP2 keeps them."""
        modules = dict(named_modules(self._model))
        self._spreads = {name: Spread.of(modules, name) for name in modules}
        self._keys = {name: KeyWeights.of(modules, name, spread) for name, spread in self._spreads.items()}

    def found(self, module: nn.Module, query: Tensor, key: Tensor) -> Call | None:
        """A call of `module` is seen. Its gains are measured in it, and used."""
        name = self._names.get(module)
        if name is None or name in self.refused or (self._wanted is not None and name not in self._wanted):
            return None
        if module not in self.layers.values():
            reason = self._why_not(module, name, query, key)
            with self._or_not_at_all():
                gains = self._gains.measured(name, self._spreads[name].part, query, key, reason)
            if isinstance(gains, str):
                self.refused[name] = gains
                return None
            self._attach(name, module, *gains)
        # The module's own hook did not see this call begin.
        running = treating.thread.running
        return None if running and running[-1].module is module else Call(module, [self._change])

    def _why_not(self, module: nn.Module, name: str, query: Tensor, key: Tensor) -> str | None:
        if query.dim() != 4 or key.dim() != 4 or type(query) is not Tensor or type(key) is not Tensor:
            return f"its queries are a {type(query).__name__} of {query.dim()} dimensions, not a tensor (B, H, M, D)"
        if any(getattr(p, "tensor_model_parallel", False) for p in module.parameters()):  # Megatron's mark
            return (
                "its heads are split over processes, and its weights, which are no DTensors, do not say how"
            )
        try:
            optim.vector_group(self._optimizers, self._spreads[name].by_head(torch.ones(1)))
        except ValueError as reason:
            return str(reason)
        norms = [child for child, _ in module.named_children() if QK_NORM.search(child) and "norm" in child]
        if norms or getattr(module, QUERY, None) is not None:
            return f"it has QK-norm already ({', '.join(norms) or QUERY})"
        if self._keys[name].shared(once(key).shape[1], key.shape[3]):
            return "tensor parallelism splits its queries, and several processes hold the same keys"
        return None

    def _attach(self, name: str, module: nn.Module, query: Tensor, key: Tensor) -> None:
        for where, values in ((QUERY, query), (KEY, key)):
            module.register_parameter(where, self._gains.make(name, self._spreads[name], values))
        Treated.add(module, self._change)
        self.layers[name] = module

    def _begun(self, *_: Any) -> None:
        """Hook before a forward of the model."""
        if not self.listening:
            self._remove_hooks()

    def _ended(self, *_: Any) -> None:
        """Hook after the first forward that raised nothing. It is the last one that is listened to."""
        if not self.listening:
            return
        with self._or_not_at_all():
            self._gains.end()
        if self.layers:
            self.start()
            return
        self.revert()
        if not self._at_once:
            _log.warning("QK-norm was not started: %s", self.why_none)

    def _failed(self, *_: Any) -> None:
        """Hook after any forward. If an error ended it, the next one goes on, or all processes give up.

        PyTorch goes through the model's hooks then, and they cannot be removed.
        """
        if not self.listening:
            return
        try:
            self._gains.end(failed=True)
        except ValueError as error:  # the forward's own error is the one to be raised
            self._take_back()
            _log.warning("QK-norm was not started: %s", error)

    def resume(self, found: Mapping[str, tuple[Tensor, Tensor]], reason: str | None) -> None:
        """Start from gains of queries and keys by layer. Raises ValueError in every process if one has a reason to."""
        self._gains.resume({layer: self.part(layer) for layer in found}, reason)
        modules = {name: module for module, name in self._names.items()}
        for layer, gains in found.items():
            device = next((p.device for p in modules[layer].parameters()), gains[0].device)
            whole = (x.full_tensor() if hasattr(x, "full_tensor") else x for x in gains)
            mine = self.part(layer)
            self._attach(layer, modules[layer], *(x[mine.of(len(x))].to(device) for x in whole))
        self.start()

    def start(self) -> None:
        """Bring the gains into the optimizer. Raises ValueError if no layer was found."""
        self._stop_listening()
        self._remove_hooks()
        if not self.layers:
            raise ValueError(self.why_none)
        if self._optimizers:
            for gain in self.gains:
                optim.vector_group(self._optimizers, gain)["params"].append(gain)
        states = good_states.of_model(self._model)
        if states is not None:
            states.join(self.gains)
        self.started = True
        _log.warning("%s", self.description)

    @property
    def description(self) -> str:
        """What was done, in words."""
        values = [float(own_part(gain.detach()).max()) for gain in self.gains]
        text = f"QK-norm in {', '.join(map(display_name, self.layers))}: gains up to {max(values, default=0.0):.2f}"
        return text + (f"; not in {self._reasons()}" if self.refused else "")

    @property
    def why_none(self) -> str:
        """Why no layer has it, in words, after a forward."""
        return (
            "expected a model with attention by scaled_dot_product_attention, or by a function of transformers, "
            f"for QK-norm, got none in its forward{'; refused: ' if self.refused else ''}{self._reasons()}"
        )

    def _reasons(self) -> str:
        return "; ".join(f"{display_name(name)}: {why}" for name, why in self.refused.items())

    def part(self, layer: str) -> HeadPart:
        """Of a layer's heads, those whose gains this process holds."""
        return self._spreads[layer].part

    def revert(self) -> None:
        """Take the norm away, with its gains and their optimizer state. A second call does nothing.

        All other weights are as they are now. If nothing was learnt since, the model computes what it computed before.
        """
        self._take_back()
        self._remove_hooks()

    def _take_back(self) -> None:
        """As `revert`, but the model keeps its hooks. They do nothing any more."""
        self._stop_listening()
        optim.leave(self._optimizers, self.gains)
        for module in self.layers.values():
            remove = partial(Treated.remove, module, self._change)
            if module is self._model:
                self._hooks.append(remove)
            else:
                remove()
            for name in (QUERY, KEY):
                delattr(module, name)
        self.layers.clear()

    @contextlib.contextmanager
    def _or_not_at_all(self) -> Iterator[None]:
        """The processes agree on what is done inside, or QK-norm does not start in any of them."""
        try:
            yield
        except ValueError:
            self.revert()
            raise

    def _stop_listening(self) -> None:
        while self._listening:
            self._listening.pop()()

    def _remove_hooks(self) -> None:
        while self._hooks:
            self._hooks.pop()()


def start_qk_norm(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None,
    *,
    layers: Collection[str] | None = None,
    forward: Callable[[], Any] | None = None,
    gains: Mapping[str, Tensor] | None = None,
    most: float = MOST,
    least: float = 0.0,
    group: Any = None,
) -> QKNormStart:
    """Normalise the queries and keys of a model's attention from now on.

    Each head gets two gains: the mean root mean square of its queries, and of its keys, over the rows of one forward,
    but at most `most` and at least `least`. Scores keep their size on average and cannot grow by longer queries or
    keys. The gains are learned, at the rate and with the weight decay of the group that holds the model's vectors.

    The gains are measured in the next forward of the model, and used in it already. Call this between two steps. If no
    layer of that forward can have the norm, the model stays as it is, and a warning says why. A forward that raises is
    none: the next one is taken, unless another process has ended its own.

    optimizer: what the gains join, one or several; None only with `gains`, for a model that is not trained.
    layers: names of the attention modules; None takes all that call `scaled_dot_product_attention` or a function of
        transformers. forward: runs one forward of the model, at once and without grad, in place of the next one. A
        compiled model needs it.
    gains: a state dict of a model with QK-norm. The layers and values come from it, for a checkpoint that is resumed:
        call this before `model.load_state_dict` and `optimizer.load_state_dict`.

    group: the processes that hold the same layers, whole, in shards or split by heads; None for all processes of
        torch.distributed. In a pipeline, those of one stage. All of them call this, and run the next forward.

    Each process of a group starts from the mean over those that hold the same heads, and averages the gains' gradients
    over them. A layer that one process has to refuse is refused in all; `refused` says which process has the reason.
    Beside weights that are DTensors the gains are such, of all heads.
    Copies of the model that were made before do not have the gains: make an EMA copy anew.

    Raises ValueError for a model whose attention cannot be reached, and in all processes of a group that hold different
    layers. TypeError for wrong arguments. It has then changed nothing.
    """
    inner, found = unwrapped(model), optim.as_list(optimizer)
    peers.check_group(group)
    bounds = check_bounds(least, most)
    compiled = is_compiled(model)
    reason = None
    try:
        wanted = None if layers is None else known_layers(inner, layers)
        if found:
            optim.vector_group(found)
        if gains is None and not found:
            raise ValueError("expected an optimizer that the gains of QK-norm join, got None")
        if gains is None and compiled and forward is None:
            raise ValueError(
                "expected forward=, which runs one forward of the model, for a compiled model, got None: "
                "a graph cannot be measured while it runs"
            )
    except ValueError as error:
        reason = str(error)
    peers.raise_together(reason, group)
    start = QKNormStart(inner, found, wanted, bounds, group)
    try:
        if gains is not None:
            _resume(start, inner, gains)
            return start
        start.listen(forward is not None)
        if forward is not None:
            devices = {p.device for p in inner.parameters() if p.is_cuda}
            eager = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
            with torch.no_grad(), torch.random.fork_rng(list(devices)), eager:
                forward()
            if not start.started:
                start.start()
            if compiled:
                torch.compiler.reset()  # graphs of before know nothing of the norm
    except BaseException:
        start.revert()
        raise
    return start


def check_bounds(least: Any, most: Any) -> tuple[float, float]:
    """Both as floats. Raises ValueError unless 0 <= least <= most, and most > 0."""
    upper = check_positive("most", most)
    if isinstance(least, bool) or not isinstance(least, (int, float)) or not 0 <= least <= upper:
        raise ValueError(f"expected least to be a number from 0 to most ({upper:g}), got {least!r}")
    return float(least), upper


def is_compiled(model: nn.Module) -> bool:
    """Whether a part of the model is compiled."""
    return any(dynamo.is_wrapper(module) for module in model.modules())


def _resume(start: QKNormStart, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    modules = dict(named_modules(model))
    start.spread()
    found: dict[str, tuple[Tensor, Tensor]] = {}
    reason = None
    for name, values in state.items():
        layer, _, last = name.rpartition(".")
        if last != QUERY:
            continue
        key = state.get(f"{layer}.{KEY}" if layer else KEY)
        if layer not in modules or key is None:
            reason = f"expected a module {layer!r} and its {KEY} for the state's {name!r}, got none"
            break
        found[layer] = values, key
    if not found and reason is None:
        reason = f"expected a state dict with entries named {QUERY!r}, got none"
    start.resume(found, reason)


def known_layers(model: nn.Module, layers: Collection[str]) -> set[str]:
    """These names. Raises ValueError if one is that of no module."""
    names = {name for name, _ in named_modules(model)}
    if isinstance(layers, str) or not set(layers) <= names:
        raise ValueError(f"expected names of modules of the model, got {layers!r}")
    return set(layers)
