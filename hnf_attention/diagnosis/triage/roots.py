"""From a symptom back to the operation or the tensor where NaN or inf began."""

from __future__ import annotations

from dataclasses import dataclass

from .records import Operation, Record, Source, TensorRecord

#: The kinds of a root.
OPERATION, SOURCE, UNSEEN = "operation", "source", "unseen"
#: A mask in an additive form holds numbers at most this large where it hides a key.
_LOW = -1e4
_LOWEST = {"float16": -65504.0, "bfloat16": -3.3895e38, "float32": -3.4028e38, "float64": -1.7976e308}


@dataclass(frozen=True, slots=True)
class Root:
    """Where NaN or inf began.

    kind: OPERATION for one whose inputs were finite, SOURCE for a tensor that the run was given, UNSEEN for memory that
        something wrote which is no operation of PyTorch.
    operation: the operation itself, or the first that read the tensor.
    tensor: of OPERATION the result that is not finite, else what was read.
    source: what is known of a tensor that the run was given.
    masked: the inputs hold -inf, put there on purpose to hide keys, and nothing else that is not finite.
    """

    kind: str
    operation: Operation
    tensor: TensorRecord
    source: Source | None = None
    masked: bool = False


def find_root(record: Record) -> Root | None:
    """The root that ran first, of all that reach a symptom; None if no symptom is NaN or inf."""
    roots = _Walk(record).roots()
    return min(roots, key=lambda root: root.operation.index, default=None)


class _Walk:
    """The walk from the symptoms, against the order of execution.

    From an operation it goes on to inputs with NaN or +inf. To -inf it goes only where nothing else is there: masks
    hold it on purpose.
    """

    def __init__(self, record: Record):
        self._record = record
        self._writers: dict[int, list[Operation]] = {}
        for operation in record.operations:
            for out in operation.outputs:
                self._writers.setdefault(out.memory, []).append(operation)

    def roots(self) -> list[Root]:
        seen: set[int] = set()
        found: list[Root] = []
        last = len(self._record.operations)
        waiting = [self._writer(memory, last) for memory in self._record.symptoms]
        while waiting:
            operation = waiting.pop()
            if operation is None or operation.index in seen:
                continue
            seen.add(operation.index)
            further, ends = self._causes(operation)
            found += ends
            waiting += further
        return found or self._given()

    def _given(self) -> list[Root]:
        """Roots of symptoms that no operation wrote: weights that were broken before and are only read."""
        return [
            Root(SOURCE, operation, read, self._record.names.get(read.memory))
            for operation in self._record.operations
            for read in operation.inputs
            if read.memory in self._record.symptoms and not read.finite
        ]

    def _writer(self, memory: int, before: int) -> Operation | None:
        """The last operation before this place that wrote NaN or inf to the memory."""
        for operation in reversed(self._writers.get(memory, ())):
            if operation.index < before and not operation.clean:
                return operation
        return None

    def _causes(self, operation: Operation) -> tuple[list[Operation], list[Root]]:
        """Where the walk goes on from an operation, and the roots that it found there."""
        broken = [x for x in operation.inputs if not x.finite]
        hard = [x for x in broken if not x.hidden_only]
        if not broken:
            return [], [Root(OPERATION, operation, first_broken(operation))]
        if hard:
            further, roots = self._back(operation, hard)
            return further, roots
        if all(x.finite or x.hidden_only for x in operation.outputs):
            return self._back(operation, broken)
        accidents = self._accidents(operation)
        if accidents or takes_minus_infinity(operation):
            return [], accidents or [Root(OPERATION, operation, first_broken(operation), masked=True)]
        return self._back(operation, broken)

    def _back(self, operation: Operation, inputs: list[TensorRecord]) -> tuple[list[Operation], list[Root]]:
        further, roots = [], []
        for read in inputs:
            writer = self._writer(read.memory, operation.index)
            if writer is not None:
                further.append(writer)
                continue
            known = self._record.names.get(read.memory)
            written = any(x.index < operation.index for x in self._writers.get(read.memory, ()))
            roots.append(Root(UNSEEN if written and known is None else SOURCE, operation, read, known))
        return further, roots

    def _accidents(self, operation: Operation) -> list[Root]:
        """Roots of -inf that nobody put there on purpose, in the inputs of an operation."""
        seen: set[int] = set()
        found: list[Root] = []
        waiting = [operation]
        while waiting:
            current = waiting.pop()
            if current.index in seen:
                continue
            seen.add(current.index)
            broken = [x for x in current.inputs if not x.finite]
            if not broken:
                if not on_purpose(current):
                    found.append(Root(OPERATION, current, first_broken(current)))
                continue
            further, _ = self._back(current, broken)  # -inf that the run was given hides keys
            waiting += further
        return found


def first_broken(operation: Operation) -> TensorRecord:
    """The first result with NaN or inf; the first result if none has."""
    return next((x for x in operation.outputs if not x.finite), operation.outputs[0])


def takes_minus_infinity(operation: Operation) -> bool:
    """Whether -inf among the inputs is in order: a softmax, an exponential, a whole attention."""
    name = operation.packet
    return "softmax" in name or operation.is_attention or name.rstrip("_") in ("exp", "exp2", "logsumexp")


def on_purpose(operation: Operation) -> bool:
    """Whether an operation makes -inf of finite numbers to hide keys.

    It was told so, or its mask holds the lowest number of a format.
    """
    if any(constant == float("-inf") for constant in operation.constants):
        return True
    out = first_broken(operation)
    lowest = _LOWEST.get(out.dtype, float("-inf"))
    if any(x.least <= 0.999 * lowest for x in operation.inputs):
        return True
    return operation.packet == "_to_copy" and all(x.most <= 0 and x.least <= _LOW for x in operation.inputs)
