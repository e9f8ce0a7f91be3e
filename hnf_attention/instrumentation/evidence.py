"""What is attention: a softmax over a product of queries and keys, whose result is multiplied with values.

Interceptors of products and of softmax tell what they see, in the order in which a module computes it. Between a
product and its softmax lie scales, masks, biases, casts and views; between the softmax and its values lie dropout and
casts. They are not followed. Products, softmaxes and values are matched by storage, then by shape, inside one call of a
module. A module without parameters counts as a part of the module that calls it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..compat import Memory, learned
from . import observer
from .coverage import is_attention
from .measurement import Measurement

INTERCEPTOR = "softmax"
_KEPT = (
    16  # products and softmaxes of one call of a module: more than any has between a product and its values
)
_PLAIN = (Tensor, nn.Parameter)

#: Kinds of doubt, see `observer.Observer.doubt`. An unmet softmax does not matter in a layer that is measured.
UNMET = "unmet"
_NO_PRODUCT, _DIMENSION = "no product", "dimension"


class Product(NamedTuple):
    """numel, shape: of the result. operands: their memory."""

    numel: int
    shape: tuple[int, ...]
    operands: tuple[Memory, ...]


class Softmax(NamedTuple):
    """A softmax that may be attention.

    of_product: its scores are a product. numel, size: of its result, and of the softmaxed dimension. memory: of the
    result. confirm: what to do when it meets values.
    """

    of_product: bool
    numel: int
    size: int
    memory: Memory
    confirm: Callable[[], None]


class Evidence:
    """What one call of a module has computed so far.

    is_named: the user says that its softmaxes are attention. is_part: it belongs to the module that calls it.
    """

    __slots__ = ("is_named", "is_part", "products", "softmaxes")

    def __init__(self, owner: observer.Owner) -> None:
        self.is_named = owner.observer.is_named(owner.module)
        self.is_part = next(owner.module.parameters(), None) is None
        self.products: deque[Product] = deque(maxlen=_KEPT)
        self.softmaxes: deque[Softmax] = deque(maxlen=_KEPT)


def guarded(look: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Run `look`, from which no error may come out: the model has computed what it needs."""
    try:
        look(*args, **kwargs)
    except Exception as error:
        observer.note_fault(error)


def saw_product(queries: Tensor, keys: Tensor, result: Tensor) -> None:
    """Take in a product. keys: the factor that the last dimension of the result comes from."""
    if not all(_is_plain(x) for x in (queries, keys, result)):
        return
    factors = queries, keys
    product = None
    if not _is_weight(keys, queries):
        product = Product(result.numel(), tuple(result.shape), tuple(map(Memory, factors)))
    confirmed = None
    for _, evidence in _reached():
        confirmed = confirmed or _that_meets(evidence, factors)
        if confirmed is not None and confirmed in evidence.softmaxes:
            evidence.softmaxes.remove(confirmed)
        if product is not None:
            evidence.products.append(product)
    if confirmed is not None:
        confirmed.confirm()


def saw_softmax(
    scores: Tensor, dim: int, result: Tensor, measure: Callable[[observer.Owner], Callable[[], Measurement]]
) -> None:
    """Take in a softmax. measure: makes what gives the measurement of the scores, or raises."""
    dim, size = dim % scores.dim(), scores.shape[dim]
    last = dim == scores.dim() - 1
    if size < 2 or not _is_plain(scores):
        return
    reached = []
    for owner, evidence in _reached():
        if last and evidence.is_named:
            owner.observer.observe(owner.layer, INTERCEPTOR, measure(owner))
            return
        if _of_a_product(evidence, scores, size):
            break
        reached.append((owner, evidence))
    else:
        _without_product(reached, scores, dim, result, measure)
        return
    if last:
        owner.observer.doubt(
            owner.layer,
            UNMET,
            f"its softmax over {tuple(scores.shape)} was not seen to be multiplied with values; if it is attention, "
            "name its class in attention_classes",
        )
        found = _confirmation(owner, measure(owner), UNMET)
    else:
        found = _listing(owner, dim, tuple(scores.shape))
    evidence.softmaxes.append(Softmax(True, scores.numel(), size, Memory(result), found))


def _without_product(
    reached: list[tuple[observer.Owner, Evidence]],
    scores: Tensor,
    dim: int,
    result: Tensor,
    measure: Callable[[observer.Owner], Callable[[], Measurement]],
) -> None:
    """Take in a softmax whose scores are no product that these modules made."""
    for owner, _ in reached:
        if not isinstance(owner.module, nn.Softmax) and _is_sequence(owner.module, scores, dim):
            owner.observer.doubt(
                owner.layer,
                _NO_PRODUCT,
                f"its softmax over dimension {dim} of {tuple(scores.shape)} is over a sequence, but its scores were "
                "not seen to be a product of queries and keys; if it is attention, name its class in attention_classes",
            )
            break
    # Products of blocks and bands are cut and joined before their softmax. A class that is named like attention is
    # believed to do that.
    for owner, evidence in reached[-1:]:
        if dim == scores.dim() - 1 > 1 and evidence.products and is_attention(owner.module):
            found = _confirmation(owner, measure(owner), _NO_PRODUCT)
            evidence.softmaxes.append(
                Softmax(False, scores.numel(), scores.shape[dim], Memory(result), found)
            )


def _reached() -> Iterator[tuple[observer.Owner, Evidence]]:
    """The running module and those around it, up to the first with parameters of its own.

    None where a compiled graph makes the call: it holds operators that measure.
    """
    for owner, invocation in observer.running(into_graphs=False):
        if invocation.evidence is None:
            if not owner.observer.measuring:
                return
            invocation.evidence = Evidence(owner)
        yield owner, invocation.evidence
        if not invocation.evidence.is_part:
            return


def _confirmation(
    owner: observer.Owner, measured: Callable[[], Measurement], doubted: str
) -> Callable[[], None]:
    def confirm() -> None:
        owner.observer.doubt(owner.layer, doubted, None)
        owner.observer.observe(owner.layer, INTERCEPTOR, measured)

    return confirm


def _listing(owner: observer.Owner, dim: int, shape: tuple[int, ...]) -> Callable[[], None]:
    reason = f"its softmax is over dimension {dim} of {shape}: only one over the last dimension is measured"
    return lambda: owner.observer.doubt(owner.layer, _DIMENSION, reason)


def _of_a_product(evidence: Evidence, scores: Tensor, size: int) -> bool:
    """Whether a product can be these scores: whole, a part of its rows, or with further keys beside its own."""
    numel = scores.numel()
    for product in evidence.products:
        shape = product.shape
        if numel == product.numel and size in shape:
            return True
        if size == shape[-1] and numel and product.numel % numel == 0:
            return True
        if size > shape[-1] > 0 and numel // size == product.numel // shape[-1]:
            return True
    return False


def _that_meets(evidence: Evidence, factors: tuple[Tensor, Tensor]) -> Softmax | None:
    """The softmax whose result is one of these factors, the newest first."""
    newest = list(reversed(evidence.softmaxes))
    for softmax in newest:
        if any(softmax.memory.holds(factor) for factor in factors):
            return softmax
    for softmax in newest:
        for weights, values in (factors, factors[::-1]):
            alike = weights.numel() == softmax.numel and softmax.size in weights.shape
            if alike and softmax.size in values.shape and not _was_factor(evidence, weights):
                return softmax
    return next((softmax for softmax in newest if not softmax.of_product), None)


def _was_factor(evidence: Evidence, tensor: Tensor) -> bool:
    """Whether an earlier product had it: queries and keys may have the shape of weights."""
    return any(operand.holds(tensor) for product in evidence.products for operand in product.operands)


def _is_plain(tensor: Tensor) -> bool:
    """Whether the tensor has a memory of its own, by which it is known again; a sparse one has several."""
    dense = tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_meta
    return dense and type(tensor) in _PLAIN


def _is_weight(keys: Tensor, queries: Tensor) -> bool:
    """Whether the product is a linear map, by a matrix that all sequences share: experts of a gate are no keys."""
    return learned(keys) or keys.dim() < min(queries.dim(), 3)


def lengths(given: Tensor) -> tuple[int, ...]:
    """The dimensions of a module's input that may be the length of its sequences."""
    shape = given.shape
    if not given.is_floating_point():  # tokens (B, N)
        return tuple(shape[1:2])
    if len(shape) == 4:  # (B, H, N, D) or an image (B, C, height, width)
        return shape[2], shape[1] * shape[2], shape[2] * shape[3]
    if len(shape) == 2:  # one sequence (N, D), or a batch of features
        return tuple(shape[:1])
    return tuple(shape[1:-1])


def _is_sequence(module: nn.Module, scores: Tensor, dim: int) -> bool:
    """Whether the dimension is as long as the sequences that the module was given, and not as wide as its features."""
    size, last = scores.shape[dim], dim == scores.dim() - 1
    for given in observer.arguments(module):
        if isinstance(given, Tensor) and size in lengths(given):
            features = last and given.is_floating_point() and given.dim() != 4 and size == given.shape[-1]
            if not features and not (last and given.dim() == 2 and _is_width(module, given, size)):
                return True
    return False


def _is_width(module: nn.Module, given: Tensor, size: int) -> bool:
    """Whether features of a batch (B, D) may have become this many: a classifier has weights for each class."""
    return given.is_floating_point() and any(size in weight.shape for weight in module.parameters())
