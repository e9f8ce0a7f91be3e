"""`trace_non_finite`: run one step again, find where NaN or inf begins, and why."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..diagnosis.triage.case import Case, Numbers
from ..diagnosis.triage.causes import UNTRACED, find_cause
from ..diagnosis.triage.finding import NonFiniteTrace
from ..diagnosis.triage.records import BATCH, BUFFER, PARAMETER, STATE, Record, Source, TensorRecord
from ..diagnosis.triage.roots import OPERATION, Root, find_root
from ..diagnosis.triage.wording import SUGGESTIONS, evidence_of
from ..names import display_name, named_modules, unwrapped
from ..versions import versions
from .calls import Calls
from .evaluate import evaluate, locate
from .kept import Kept, keeping
from .owners import Owners
from .place import find_place
from .recorder import Captured, Recorder, Wanted, local
from .reproduction import check_folder, write_reproduction
from .step import Outcome, Step, make_step
from .wide import replay_wide

#: (what is being done, how many of the runs are done, how many there are)
Progress = Callable[[str, int, int], None]


def trace_non_finite(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any], Tensor] | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    scaler: torch.amp.GradScaler | None = None,
    wide: bool = True,
    folder: str | Path | None = None,
    step: int | None = None,
    progress: Progress = lambda doing, done, total: None,
) -> NonFiniteTrace:
    """Run one training step again and say where NaN or inf begins: layer, head, tensor, row, operation and cause.

        trace = trace_non_finite(model, lambda: model(**batch).loss, optimizer=optimizer)
        print(trace)

    batch: what the model takes (a tensor, or a mapping or sequence of its arguments), or a callable without arguments
        that runs the forward and returns the loss, an output with a `loss`, or outputs. The callable may run the
        backward itself; otherwise it is run of what was returned, if that is one number with a gradient.
    loss: makes the loss of what the model, or the callable, returns; None where that holds it.
    optimizer: its step is traced, too. scaler: the loss is scaled by it before the backward. Give both if the callable
        uses them itself: they are put back only then. What it runs itself is not run again.
    wide: run the step in double precision as well (single where that fails), which tells overflow of the format.
    folder: write a minimal reproduction there, the tensors of the operation and a script; see
        `replay.reproduction`. Needs safetensors.
    step: the number of the training step, to be repeated in the answer.

    The step runs up to four times, each time from the same weights, states and random numbers: to record every
    operation, to copy the tensors of one, to watch the attention, and in the wider format. Modules that were compiled
    run without compilation. Afterwards weights, buffers, gradients, the optimizer's states and the random numbers are
    as they were, to the last bit. Memory: a copy of these, and for `wide` the weights in double precision.

    Raises TypeError for a batch, model, loss, optimizer or scaler of another kind, and for a step that gives neither a
    loss tensor nor outputs nor gradients; ValueError for a model on the meta device, and if the folder holds other
    files; and ImportError if safetensors is missing. An error of the step itself comes out if all was finite before it.
    """
    run = make_step(unwrapped_of(model), batch, loss, optimizer, scaler)
    target = None if folder is None else check_folder(Path(folder))
    total = 4 if wide else 3
    with keeping(run.model, optimizer, scaler) as kept, _uncompiled():
        progress("recording", 0, total)
        record, outcome = _record(run, kept)
        root = find_root(record)
        if root is None:
            if outcome.error is not None:
                raise outcome.error
            return _untraced(record, outcome, step) if record.symptoms else _nothing(record, outcome, step)
        outcome.error = None  # with what its frames hold
        progress("copying the tensors of one operation", 1, total)
        captured = _capture(run, kept, root, record)
        progress("watching attention", 2, total)
        kept.rewind()
        with Calls(run.model) as calls:
            run.run(_Forward(), plain=True)
        kept.rewind()
        case, notes = _case(run, root, record, calls, captured)
        cause = find_cause(case)
        replayed = None
        if wide:
            progress("running in a wider format", 3, total)
            replayed = replay_wide(run, kept)
    operation, place = root.operation, case.place
    found = NonFiniteTrace(
        cause=cause,
        phase=operation.phase,
        layer=place.layer,
        module=operation.module,
        heads=place.heads,
        tensor=place.tensor,
        batch=place.batch,
        row=place.row,
        operation=operation.name,
        dtype=root.tensor.dtype,
        evidence=evidence_of(case, cause),
        suggestion=SUGGESTIONS[cause],
        wide=replayed,
        symptoms=tuple(record.symptoms.values()),
        notes=(*notes, *outcome.notes),
        step=step,
    )
    if target is None or captured is None:
        return found
    return replace(found, reproduction=write_reproduction(target, found, captured, case.numbers))


def unwrapped_of(model: Any) -> Any:
    """The model without the wrappers of data parallelism; anything else as it is."""
    return unwrapped(model) if isinstance(model, nn.Module) else model


class _Forward:
    """For a run of the forward alone: nothing is left to do after it."""

    went_back = stepped = scaled = True


def _uncompiled() -> AbstractContextManager[Any]:
    """A context in which torch.compile's graphs are not used: no dispatch mode sees inside of them."""
    compiled = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def _record(run: Step, kept: Kept) -> tuple[Record, Outcome]:
    """The record of one step, with names for what it was given and the symptoms that it left."""
    kept.rewind()
    recorder = Recorder(Owners(run.model))
    names = _names(run, recorder)
    with recorder:
        outcome = run.run(recorder)
    outcome.check()
    kept.scaler_ran = outcome.scaled
    names |= _states(run, recorder)
    seen = [(recorder.add(x, name), name) for name, x in _visible(run, outcome)]
    recorder.read()
    symptoms = {found.memory: name for found, name in seen if _is_symptom(found, name)}
    if not symptoms and outcome.error is not None:
        broken = [
            x for x in recorder.operations if any(not y.finite and not y.hidden_only for y in x.outputs)
        ]
        symptoms = {x.memory: "the error that ended the step" for x in (broken[-1].outputs if broken else [])}
    outcome.outputs = None  # which hold the memory of the forward
    outcome.loss = None if outcome.loss is None else outcome.loss.detach()
    return Record(recorder.operations, names, symptoms), outcome


def _names(run: Step, recorder: Recorder) -> dict[int, Source]:
    names = {recorder.memory(x): Source(BATCH, name) for name, x in run.inputs.items()}
    for source, x in _named(run.model):
        names.setdefault(recorder.memory(local(x)), source)
    return names | _states(run, recorder)


def _named(model: nn.Module) -> Iterator[tuple[Source, Tensor]]:
    """The buffers and parameters of a model by their names, without those of wrappers."""
    for prefix, module in named_modules(model):
        at = f"{prefix}." if prefix else ""
        for name, x in module.named_buffers(recurse=False):
            yield Source(BUFFER, at + name), x
        for name, x in module.named_parameters(recurse=False):
            yield Source(PARAMETER, at + name), x


def _states(run: Step, recorder: Recorder) -> dict[int, Source]:
    """The states of the optimizer, some of which its first step makes."""
    if run.optimizer is None:
        return {}
    names = {id(x): source.name for source, x in _named(run.model)}
    found: dict[int, Source] = {}
    for parameter, state in run.optimizer.state.items():
        owner = names.get(id(parameter), "a parameter outside of the model")
        for key, x in state.items():
            if isinstance(x, Tensor):
                found[recorder.memory(local(x))] = Source(STATE, key, owner)
    return found


def _visible(run: Step, outcome: Outcome) -> list[tuple[str, Tensor]]:
    """What the user sees of a step: loss, outputs, gradients, weights and states after it."""
    loss = [] if outcome.loss is None else [("loss", outcome.loss)]
    seen = loss or [(f"output {name}", x) for name, x in (outcome.outputs or {}).items()]
    seen += [
        (f"gradient of {name}", x.grad) for name, x in run.model.named_parameters() if x.grad is not None
    ]
    if run.optimizer is not None:
        seen += [(f"weight {name}", x) for name, x in run.model.named_parameters()]
        seen += [
            (f"optimizer state {key}", x)
            for state in run.optimizer.state.values()
            for key, x in state.items()
            if isinstance(x, Tensor)
        ]
    return [(name, local(x).detach()) for name, x in seen if not x.is_sparse]


def _is_symptom(found: TensorRecord, name: str) -> bool:
    """Whether it is not finite; -inf in an output may hide something on purpose."""
    return not found.finite and not (name.startswith("output ") and found.hidden_only)


def _capture(run: Step, kept: Kept, root: Root, record: Record) -> Captured | None:
    """The tensors of the root's operation, from a second run; None if that took another course."""
    kept.rewind()
    wanted = root.operation
    like = (wanted.name, wanted.module, wanted.phase)
    before = sum((x.name, x.module, x.phase) == like for x in record.operations[: wanted.index])
    recorder = Recorder(Owners(run.model), Wanted(*like, before))
    with recorder:
        run.run(recorder)
    return recorder.captured


def _case(
    run: Step, root: Root, record: Record, calls: Calls, captured: Captured | None
) -> tuple[Case, list[str]]:
    """All that is known of a root, and notes on what is not."""
    notes: list[str] = []
    numbers = Numbers()
    if captured is None:
        notes.append(
            "a second run of the step took another course, so the numbers of this operation are not known"
        )
    elif root.kind == OPERATION:
        numbers = evaluate(root.operation, captured)
        if not numbers.overflowed:
            notes.append(
                "this operation was finite in a second run: the step does not repeat itself to the bit"
            )
    else:
        numbers = locate(captured, _given(run, root))
    if calls.unseen is not None:
        notes.append(f"attention was not watched: {calls.unseen}")
    place = find_place(root, record, calls, numbers, captured)
    index = root.operation.index
    written = record.names.get(root.tensor.memory)
    case = Case(
        root,
        numbers,
        place,
        following=tuple(record.operations[index + 1 : index + 30]),
        written_state=written.name if written is not None and written.kind == STATE else "",
        versions=_versions(root),
    )
    return case, notes


def _given(run: Step, root: Root) -> Tensor | None:
    """The tensor that the run was given, as it was before it; None if it is not known by name."""
    source = root.source
    if source is None or source.kind == STATE:
        return None
    if source.kind == BATCH:
        return run.inputs.get(source.name)
    return next((local(x).detach() for found, x in _named(run.model) if found == source), None)


def _versions(root: Root) -> str:
    """The software that may have computed an operation."""
    operation = root.operation
    if operation.library == "aten" and not operation.is_attention:
        return f"torch {torch.__version__}"
    names = ("torch",) if operation.library == "aten" else ("torch", "triton", operation.library)
    texts = [
        f"{name} {version}" for name, version in versions(*names).items() if version and name != "python"
    ]
    if torch.cuda.is_available():
        if torch.backends.cudnn.is_available():
            texts.append(f"cuDNN {torch.backends.cudnn.version()}")
        texts.append(torch.cuda.get_device_name())
    return ", ".join(texts)


def _untraced(record: Record, outcome: Outcome, step: int | None) -> NonFiniteTrace:
    symptoms = tuple(record.symptoms.values())
    evidence = f"NaN or inf in {symptoms[0]}, which no operation was seen to write or to read"
    return NonFiniteTrace(
        UNTRACED,
        evidence=evidence,
        suggestion=SUGGESTIONS[UNTRACED],
        symptoms=symptoms,
        notes=tuple(outcome.notes),
        step=step,
    )


def _nothing(record: Record, outcome: Outcome, step: int | None) -> NonFiniteTrace:
    passing = [x for x in record.operations if any(not y.finite and not y.hidden_only for y in x.outputs)]
    loss = "" if outcome.loss is None else f", loss {float(outcome.loss.detach()):.6g}"
    notes = list(outcome.notes)
    if passing:
        first, many = passing[0], len(passing)
        where = "" if first.module is None else f" in {display_name(first.module)}"
        notes.append(
            f"{many} operation{'' if many == 1 else 's'} gave NaN or +inf that reached neither loss nor gradients; "
            f"the first was {first.name}{where}, {first.phase}"
        )
    return NonFiniteTrace(None, evidence=f"everything is finite{loss}", notes=tuple(notes), step=step)
