"""Proof by trial: whether rows of weights are a layer's queries and keys by head, shown by what it computes from them.

The trial runs a copy of the module with random weights on random inputs. It is independent of names.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import compat
from ..errors import let_out
from ..instrumentation import witness
from . import norms, trial_inputs
from .projections import Projections
from .shards import Spread, own_class

#: Scores (B, H, M, N) before the softmax, in fp64, and the output of one run.
Run = Callable[[], tuple[Tensor, Tensor]]

_SMALLEST = 1e-2  # a score's part that comes from the weights: random weights give about 1
_TOLERANCE = 0.05  # of that part: rounding in bf16 stays below, a wrong row is off by half
_SAME_OUTPUT = 1e-2  # of the largest output: factors are powers of two, which round nothing
_MASKED = 1e4  # larger scores are those of masked keys

_verdicts: weakref.WeakKeyDictionary[nn.Module, dict[Any, str | None]] = weakref.WeakKeyDictionary()
_of_classes: weakref.WeakKeyDictionary[nn.Module, dict[Any, str | None]] = weakref.WeakKeyDictionary()


def disproof(
    model: nn.Module,
    place: nn.Module,
    what: tuple[int, int],
    read: Callable[[nn.Module], Projections],
    spread: Spread,
) -> str | None:
    """Why the projections of `place` are not proved to be what `read` takes them for; None if they are.

    place: the module that holds them, in `model`. what: the number of heads, and of the candidate that `read` tries.
    read: finds them in a copy of the module. Each candidate is tried once. spread: how they lie over processes.
    """
    num_heads = what[0]
    key = (
        *what,
        witness.of(place) is None,
        *((name, type(module)) for name, module in place.named_modules()),
    )
    verdicts = _verdicts.setdefault(place, {})
    if key not in verdicts:
        verdicts[key] = _try(model, place, num_heads, read, spread)
    return verdicts[key]


def known_disproof(
    model: nn.Module,
    place: nn.Module,
    num_heads: int,
    read: Callable[[nn.Module], Projections],
    spread: Spread,
) -> str | None:
    """As `disproof`, by lengths alone, for a module whose class is known: its forward may have been replaced.

    None, too, for a module that cannot be tried. One module of each class and forward is tried.
    """
    forward = getattr(place.forward, "__func__", place.forward)
    key = type(place), forward, num_heads
    verdicts = _of_classes.setdefault(model, {})
    if key not in verdicts:
        try:
            verdicts[key] = _Trial(model, place, num_heads, read, spread).lengths()
        except Exception as error:  # of any kind: the class is known
            let_out(error)
            verdicts[key] = None
    return verdicts[key]


def _try(
    model: nn.Module,
    place: nn.Module,
    num_heads: int,
    read: Callable[[nn.Module], Projections],
    spread: Spread,
) -> str | None:
    kind = type(place).__name__
    try:
        trial = _Trial(model, place, num_heads, read, spread)
    except Exception as error:  # of any kind: what cannot be tried is refused
        let_out(error)
        return f"a trial of {kind} could not be prepared: {_short(error)}"
    try:
        return trial.scores() or trial.lengths()
    except Exception as error:  # likewise
        let_out(error)
        return f"a trial of {kind} on random inputs failed: {_short(error)}"


class _Trial:
    """A copy of a module with random weights, and what it runs on."""

    def __init__(
        self,
        model: nn.Module,
        place: nn.Module,
        num_heads: int,
        read: Callable[[nn.Module], Projections],
        spread: Spread,
    ):
        self._heads = num_heads
        self._tried = _random_copy(model, place, spread).eval()
        self._projections = read(self._tried)
        self._inputs, self._named = trial_inputs.of(place, self._tried, self._projections)

    def scores(self) -> str | None:
        """What contradicts the projections when they are scaled."""

        def run() -> tuple[Tensor, Tensor]:
            caught, output = self._run()
            return caught.scores(), _first_tensor(output)

        with self._alone():
            return contradiction(run, self._projections)

    def lengths(self) -> str | None:
        """What contradicts them by the lengths of queries and keys."""
        with self._alone():
            return norms.contradiction(self._tried, self._projections, lambda: self._run()[0].pair)

    def _run(self) -> tuple[_Caught, Any]:
        with _Caught(self._heads) as caught:
            return caught, self._tried.forward(*self._inputs, **self._named)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        device = self._projections.query[0].device
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield


def contradiction(run: Run, projections: Projections) -> str | None:
    """What of the scores or the output contradicts that scaling the projections scales the scores; None for nothing.

    Factors are powers of two, whose products are exact. The projections have their old values at the end.
    """
    heads, key_heads = projections.num_heads, projections.num_key_heads
    before, output = run()
    if before.shape[1] != heads:
        return f"its attention has {before.shape[1]} heads, not {heads}"
    visible = before.abs() < _MASKED

    def change(query: Tensor, key: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """How scores and output change with these factors."""
        projections.multiply(query, key)
        try:
            scores, out = run()
        finally:
            projections.multiply(1 / query, None if key is None else 1 / key)
        return torch.where(visible, scores - before, 0.0), (out - output).abs().amax()

    ones = torch.ones(heads, dtype=torch.float64)
    part = change(2 * ones)[0]  # what the weights contribute to the scores
    size = part.abs().amax((0, 2, 3))
    if not bool((size > _SMALLEST).all()):
        return (
            "scores stay as they are when a head's query weights double (QK-norm, or another order of rows)"
        )

    def differ(found: Tensor, expected: Tensor) -> bool:
        return not bool(((found - expected).abs().amax((0, 2, 3)) <= _TOLERANCE * size).all())

    if differ(change(4 * ones)[0], 3 * part):
        return "scores do not grow in proportion to query weights (a clamp, a soft-cap, or another order of rows)"
    codes = torch.arange(1, heads + 1)
    chosen = [
        (codes >> bit & 1).double() for bit in range(heads.bit_length())
    ]  # no two heads are chosen alike
    for some in chosen:
        if differ(change(1 + some)[0], part * some.view(-1, 1, 1).to(part.device)):
            return "its query weights are not ordered by head, one head after the other"
    if projections.keys_shared:  # their keys are never scaled alone
        pairs = [(2 * ones, torch.full((key_heads,), 0.5, dtype=torch.float64))]
    else:
        pairs = [(1 + some, 1 / (1 + some)) for some in chosen]
    largest = output.abs().amax()
    for query, key in pairs:
        scores, out = change(query, key)
        if differ(scores, torch.zeros_like(scores)):
            return "its key weights are not ordered by head, one head after the other"
        if not bool(out <= _SAME_OUTPUT * largest):
            return "its query and key weights serve something else too, such as values or a gate"
    return None


class _Caught(TorchFunctionMode):
    """Keeps the queries and keys of the attention that PyTorch computes, or the scores that it softmaxes."""

    def __init__(self, num_heads: int):
        super().__init__()
        self._num_heads = num_heads
        self._products: list[Tensor] = []
        self._softmaxed: list[Tensor] = []
        self._pairs: list[tuple[Tensor, Tensor]] = []

    @property
    def pair(self) -> tuple[Tensor, Tensor] | None:
        """The queries and keys of the one attention by scaled_dot_product_attention; None if there was none."""
        return self._pairs[0] if len(self._pairs) == 1 else None

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the function; keep what it computes attention from."""
        kwargs = kwargs or {}
        # By name: an instrumentation replaces functions of torch by its own.
        name = getattr(func, "__name__", None)
        if name == "scaled_dot_product_attention":
            query, key = _pair(*args[:2], **kwargs)
            self._products.append(_products(query, key, **kwargs))
            self._pairs.append((query, key))
        elif name == "softmax":
            self._softmaxed.append((args[0] if args else kwargs["input"]).double())
        return func(*args, **kwargs)

    def scores(self) -> Tensor:
        """(B, H, M, N), of the one attention that ran. Raises ValueError for none or several."""
        found = self._products or [x for x in map(self._by_head, self._softmaxed) if x is not None]
        if len(found) != 1:
            raise ValueError(f"expected one attention by PyTorch's functions, got {len(found)}")
        return found[0]

    def _by_head(self, scores: Tensor) -> Tensor | None:
        if scores.dim() == 3 and scores.shape[0] % self._num_heads == 0:  # (B * H, M, N)
            scores = scores.unflatten(0, (-1, self._num_heads))
        return scores if scores.dim() == 4 and scores.shape[1] == self._num_heads else None


def _pair(query: Tensor, key: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return query, key


def _products(query: Tensor, key: Tensor, **options: Any) -> Tensor:
    """Every query times every key in fp64: (B, H, M, N), before scale, mask and bias."""
    if query.dim() != 4:
        raise ValueError(f"expected queries (B, H, M, D), got {tuple(query.shape)}")
    if options.get("enable_gqa"):
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return query.double() @ key.double().transpose(-1, -2)


def _random_copy(model: nn.Module, place: nn.Module, spread: Spread) -> nn.Module:
    """A copy of a module without hooks, whose floating-point parameters are random; it shares the rest of the model.

    Random weights show what a weight of zero hides. Of a DTensor it has what a process holds during a forward: the
    rows of its own heads, and all of what FSDP2 keeps in shards.
    """
    inside = set(place.modules())
    memo: dict[int, Any] = {id(module): module for module in model.modules() if module not in inside}
    memo |= {
        id(p): _random(p, spread.own_shape(p), seed)
        for seed, p in enumerate(place.parameters())
        if _is_plain(p)
    }
    for module in inside:
        memo |= {id(hooks): type(hooks)() for hooks in compat.hooks(module)}
        kept = (value for value in vars(module).values() if isinstance(value, Tensor) and not value.is_leaf)
        memo |= {id(value): value.detach() for value in kept}  # such tensors cannot be copied
    copied = _copy(place, memo)
    for module in copied.modules():
        if compat.splits_layer(vars(module).get("forward")):  # it would run the module that was copied
            del vars(module)["forward"]
    return copied


def _copy(place: nn.Module, memo: dict[int, Any]) -> nn.Module:
    cls = own_class(place)
    if cls is type(place):
        return copy.deepcopy(place, memo)
    copied: nn.Module = cls.__new__(cls)  # FSDP2's class, and its state under dunder names, cannot be copied
    memo[id(place)] = copied
    states = {name: value for name, value in vars(place).items() if not name.startswith("__")}
    vars(copied).update(copy.deepcopy(states, memo))
    return copied


def _is_plain(parameter: Tensor) -> bool:
    sharded = hasattr(parameter, "placements")
    return (
        parameter.is_floating_point()
        and parameter.element_size() > 1
        and (sharded or type(parameter.data) is Tensor)
    )


def _random(parameter: Tensor, shape: tuple[int, ...], seed: int) -> nn.Parameter:
    values = trial_inputs.normal(shape, parameter, seed)
    is_matrix = len(shape) > 1  # others are biases and gains
    values = values * (shape[0] / values.numel()) ** 0.5 if is_matrix else 1 + 0.25 * values.clamp(-2, 2)
    return nn.Parameter(values, requires_grad=parameter.requires_grad)


def _first_tensor(output: Any) -> Tensor:
    while isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise TypeError(f"expected a tensor first in its output, got {type(output).__name__}")
    return output.double()


def _short(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:120] if text else ''}"
