"""What instrumenting a tiny architecture gives, beside the plain model and the weights that it returns.

python tests/examined.py --write    # makes the table of docs/architectures.md anew
"""

import functools
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from architectures import ARCHITECTURES
from tiny_architecture import transformers
from torch import Tensor, nn

from hnf_attention.instrumentation import Coverage, Measurement, instrument
from hnf_attention.instrumentation.interceptors.multihead import INTERCEPTOR as MULTIHEAD
from hnf_attention.instrumentation.interceptors.sdpa import NAME as SDPA

PAGE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
MARKED = re.compile(r"(<!-- architectures, by tests/examined.py -->\n).*?(<!-- end -->)", re.DOTALL)
VERSION = ".".join(transformers.__version__.split(".")[:2])
KINDS = ("decoder", "encoder", "encoder-decoder", "vision", "audio", "multimodal")
# A row's statistics are those of its weights, in single precision.
CLOSE = {"rtol": 2e-4, "atol": 2e-5}


@dataclass
class Run:
    """One forward and backward: all tensors of the output, all gradients, and what was measured."""

    output: list[Tensor]
    gradients: dict[str, Tensor]
    calls: list[Measurement] = field(default_factory=list)
    coverage: Coverage | None = None


@dataclass
class Examined:
    """What was found of one architecture under one implementation.

    returned: attention weights that the eager model returns. matched: how many are those of a measured
    call. others: layers of the other measured calls. gaps: layers that ran, and that `coverage` lists.
    output, gradients: whether they are equal bit for bit in probe mode. fused: whether our attention took
    the place of the model's in fused mode, and the errors of output and gradients there.
    sharpness: of the layer whose attention is the most uniform, the mean largest weight, 1 if uniform.
    """

    interceptors: tuple[str, ...]
    returned: int
    matched: int
    others: list[str]
    gaps: set[str]
    output: bool
    gradients: bool
    fused: bool
    fused_output: float
    fused_gradients: float
    sharpness: float


def tensors(output) -> Iterator[Tensor]:
    """All floating-point tensors in an output, in order."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, (dict, tuple, list)):
        for value in output.values() if isinstance(output, dict) else output:
            yield from tensors(value)


def stacks(output) -> Iterator[list[Tensor]]:
    """The attention weights in an output, those of one field together."""
    for name, value in output.items():
        if "attentions" in name and value is not None:
            yield list(tensors(value))
        elif isinstance(value, dict):
            yield from stacks(value)


def run(model: nn.Module, arguments: dict, mode: str | None) -> Run:
    model.zero_grad()

    def step() -> Run:
        output = list(tensors(model(**arguments)))
        sum((x * torch.randn_like(x)).mean() for x in output if x.requires_grad).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return Run([x.detach() for x in output], gradients)

    torch.manual_seed(0)
    if mode is None:
        return step()
    with instrument(model, mode=mode) as instrumentation:
        calls: list[Measurement] = []
        instrumentation.on_measure = calls.append
        done = step()
        done.calls, done.coverage = calls, instrumentation.coverage
    return done


def is_of(call: Measurement, weights: Tensor) -> bool:
    """Whether a call's rows are those of eager weights (B, H, M, N); a learned sink has what they lack of 1.

    Rows are left out that see no key, and those that the model sets to 0 after its softmax.
    """
    rows, weights = call.rows, weights.double()
    if weights.dim() == 5:  # in blocks of queries
        heads = 1 if weights.shape[1] == rows.entropy.shape[1] else 2
        weights = weights.movedim(heads, 1).flatten(2, 3)
    if weights.dim() == 3 and weights[..., 0].numel() == rows.entropy.numel():
        weights = weights.reshape(*rows.entropy.shape, -1)
    if rows.entropy.shape != weights.shape[:3]:
        return False
    if (weights < 0).any():  # SqueezeBERT returns its scores
        weights = weights.softmax(-1)
    seen = (call.visible_keys > 0).expand(weights.shape[:3]) & (weights.sum(-1) > 0)
    sink = (1 - weights.sum(-1)).clamp(min=0)
    entropy = torch.special.entr(weights).sum(-1) + torch.special.entr(sink)
    return torch.allclose(rows.entropy.double()[seen], entropy[seen], **CLOSE) and torch.allclose(
        rows.max_weight.double()[seen], weights.amax(-1)[seen], **CLOSE
    )


def matched(calls: list[Measurement], of_model: list[list[Tensor]]) -> list[Measurement]:
    """The calls whose weights the model returns: one for each, in the order of their stack."""
    found: list[int] = []
    for stack in of_model:
        last = -1
        for weights in stack:
            places = (i for i, call in enumerate(calls) if i > last and i not in found)
            place = next((i for i in places if is_of(calls[i], weights)), None)
            if place is not None:
                last = place
                found.append(place)
    return [calls[i] for i in found]


@contextmanager
def running(model: nn.Module) -> Iterator[set[str]]:
    """The names of the modules that are called inside."""
    ran: set[str] = set()
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: ran.add(name))
        for name, module in model.named_modules()
    ]
    yield ran
    for hook in hooks:
        hook.remove()


def innermost(names: set[str]) -> set[str]:
    """Without those that have another one inside."""
    return {name for name in names if not any(other.startswith(f"{name}.") for other in names)}


def error(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to each tensor's largest entry (or a hundredth of all tensors')."""
    whole = max(float(x.abs().max()) for x in expected)
    return max(
        float((a - b).abs().max()) / max(float(b.abs().max()), whole / 100) for a, b in zip(got, expected)
    )


def equal(got: Run, expected: Run) -> tuple[bool, bool]:
    """Whether the outputs are, and whether the gradients are, bit for bit."""
    outputs = len(got.output) == len(expected.output) and all(map(torch.equal, got.output, expected.output))
    same = got.gradients.keys() == expected.gradients.keys()
    return outputs, same and all(
        torch.equal(got.gradients[name], gradient) for name, gradient in expected.gradients.items()
    )


@functools.cache
def examined(name: str, implementation: str) -> Examined:
    """Raises KeyError for a name that is no architecture's."""
    architecture = ARCHITECTURES[name]
    model, eager = architecture.build(implementation), architecture.build("eager")
    arguments = architecture.arguments(model)
    torch.manual_seed(0)
    with torch.no_grad(), running(eager) as ran:
        of_model = list(stacks(eager(**arguments, output_attentions=True)))
    plain, probe, fused = (run(model, arguments, mode) for mode in (None, "probe", "fused"))
    found = matched(probe.calls, of_model)
    output, gradients = equal(probe, plain)
    return Examined(
        interceptors=tuple(dict.fromkeys(map(interceptor, probe.coverage.measured.values()))),
        returned=sum(map(len, of_model)),
        matched=len(found),
        others=[call.layer for call in probe.calls if not any(call is x for x in found)],
        gaps=innermost(probe.coverage.not_measured.keys() & ran),
        output=output,
        gradients=gradients,
        fused=any(how.startswith("fused") for how in fused.coverage.measured.values()),
        fused_output=error(fused.output, plain.output),
        fused_gradients=error([fused.gradients[x] for x in plain.gradients], list(plain.gradients.values())),
        sharpness=min(float(w.amax(-1).mean()) * w.shape[-1] for stack in of_model for w in stack),
    )


def interceptor(how: str) -> str:
    """As the table names it."""
    name = how[how.rindex("(") + 1 :].partition(")")[0].removeprefix("transformers ")
    return {SDPA: "SDPA call", MULTIHEAD: "nn.MultiheadAttention"}.get(name, name)


def row(name: str) -> str:
    architecture = ARCHITECTURES[name]
    of = [examined(name, implementation) for implementation in architecture.compared()]
    close = ", close" if any(x.fused for x in of) else ""
    interceptors = ", ".join(dict.fromkeys(name for x in of for name in x.interceptors)) or "listed"
    cells = [name, architecture.kind, architecture.special, interceptors]
    cells.append(f"equal{close}" if all(x.output for x in of) else "differs")
    first = of[0]
    if architecture.incomparable:
        cells.append(f"{len(first.others)} measured; the model returns {architecture.incomparable}")
    else:
        more = len(set(first.others))
        listed = f", {len(first.gaps)} listed" if first.gaps else ""
        cells.append(f"{first.matched} of {first.returned}{listed}{f', {more} more' if more else ''}")
    cells.append(f"equal{close}" if all(x.gradients for x in of) else "differs")
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """That of the page, of the architectures that the installed version of transformers has."""
    names = [name for name, architecture in ARCHITECTURES.items() if architecture.exists]
    kinds = ", ".join(f"{sum(ARCHITECTURES[n].kind == kind for n in names)} {kind}" for kind in KINDS)
    return "\n".join(
        [
            f"{len(names)} models of transformers {VERSION} ({kinds})",
            "",
            "| architecture | kind | special | interceptor | output | statistics | gradient |",
            "|---|---|---|---|---|---|---|",
            *map(row, names),
        ]
    )


def filled(page: str) -> str:
    """The text with the table made anew; raises ValueError where its two comments are missing."""
    text, places = MARKED.subn(lambda match: f"{match[1]}{table()}\n{match[2]}", page)
    if places != 1:
        raise ValueError(f"expected one table of {Path(__file__).name} between its comments, got {places}")
    return text


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit(f"expected --write, which makes the table in {PAGE} anew, got {sys.argv[1:]}")
    torch.set_num_threads(1)
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
