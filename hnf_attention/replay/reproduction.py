"""A minimal reproduction: one operation's tensors, cut to where the fault still shows, and a script that runs it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..diagnosis.triage.case import Numbers
from ..diagnosis.triage.finding import NonFiniteTrace
from .cuts import Call, cuts
from .recorder import Captured, named_arguments, named_results

TENSORS, SCRIPT = "tensors.safetensors", "reproduce.py"

_TEMPLATE = '''"""{title}"""
from pathlib import Path

import torch
from safetensors.torch import load_file
{library}
tensors = load_file(Path(__file__).with_name("{tensors}"), device="{device}")
for name, x in tensors.items():
    print(f"{{name}}: {{x.dtype}} {{tuple(x.shape)}},", "finite" if x.isfinite().all() else "NOT FINITE")
result = torch.ops.{operator}(
    {arguments},
)
for place, x in enumerate({results}):
    print(f"result {{place}}:", "finite" if x.isfinite().all() else f"NOT FINITE {{x[~x.isfinite()][:8].tolist()}}")
'''


def check_folder(folder: Path) -> Path:
    """The folder, made if it is missing, before anything is run.

    Raises ImportError without safetensors, ValueError for a folder with other files or one that cannot be made.
    """
    try:
        import safetensors  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "a reproduction needs safetensors, which is not installed: pip install 'hnf-attention[huggingface]'"
        ) from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = sorted(x.name for x in folder.iterdir() if x.name not in (TENSORS, SCRIPT))
    except OSError as error:
        raise ValueError(f"cannot write a reproduction to {folder}: {error.strerror}") from error
    if others:
        raise ValueError(f"expected an empty folder for the reproduction, got {folder} with {others[0]}")
    return folder


def write_reproduction(folder: Path, trace: NonFiniteTrace, captured: Captured, numbers: Numbers) -> Path:
    """Write the tensors and the script; returns the folder."""
    from safetensors.torch import save_file

    call = _smallest(captured, numbers)
    texts: list[str] = []
    tensors: dict[str, Tensor] = {}
    for name, value in call.arguments:
        texts.append(f"{name}={_text(name, value, tensors)}")
    devices = {x.device.type for x in tensors.values()}
    device = next((x for x in devices if x != "cpu"), "cpu")
    if device != "cpu":
        # A kernel may take some of its numbers, such as seeds, from the CPU.
        texts = [_on_cpu(text, tensors) for text in texts]
    save_file({name: x.contiguous().cpu() for name, x in tensors.items()}, folder / TENSORS)
    written = [name for name, _ in named_results(captured.operator, *call.split(captured.operator), None)]
    results = "[result] if isinstance(result, torch.Tensor) else result"
    if written:
        results = "[" + ", ".join(f'tensors["{_key(name)}"]' for name in written) + "]"
    library = str(captured.operator).split(".")[0]
    (folder / SCRIPT).write_text(
        _TEMPLATE.format(
            title=_title(trace),
            library=_import(library),
            tensors=TENSORS,
            device=device,
            operator=str(captured.operator),
            arguments=",\n    ".join(texts),
            results=results,
        ),
        encoding="utf-8",
    )
    return folder


def _smallest(captured: Captured, numbers: Numbers) -> Call:
    """The smallest cut of the call whose result is not finite; the whole call if no cut shows it."""
    whole = Call(list(named_arguments(captured.operator, captured.args, captured.kwargs)))
    for cut in cuts(captured.operator, whole, numbers):
        if _shows(captured.operator, cut):
            return cut
    return whole


def _shows(operator: Any, call: Call) -> bool:
    args, kwargs = call.copied().split(operator)
    try:
        with torch.no_grad():
            result = operator(*args, **kwargs)
    except (RuntimeError, ValueError, TypeError, IndexError):  # shapes that this operation does not take
        return False
    results = named_results(operator, args, kwargs, result)
    return any(x.is_floating_point() and not bool(x.isfinite().all()) for _, x in results)


def _key(name: str) -> str:
    return name.replace("[", "_").replace("]", "")


def _text(name: str, value: Any, tensors: dict[str, Tensor]) -> str:
    """The argument as source text; its tensors are added to `tensors`."""
    if isinstance(value, Tensor):
        tensors[_key(name)] = value
        return f'tensors["{_key(name)}"]'
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_text(f'{name}[{place}]', x, tensors) for place, x in enumerate(value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return f"torch.{value!r}" if isinstance(value, torch.device) else repr(value)


def _on_cpu(text: str, tensors: dict[str, Tensor]) -> str:
    for name, x in tensors.items():
        if x.device.type == "cpu":
            text = text.replace(f'tensors["{name}"]', f'tensors["{name}"].cpu()')
    return text


def _import(library: str) -> str:
    if library == "aten":
        return ""
    if library == "hnf_attention":
        return "\nimport hnf_attention.engine.api  # registers the operator\n"
    return f"\n# Import here what registers the operators of {library!r}.\n"


def _title(trace: NonFiniteTrace) -> str:
    return "".join(_safe(f"{trace.cause}: {trace.evidence}."))


def _safe(text: str) -> Iterator[str]:
    """The text without what would end a docstring."""
    yield from text.replace("\\", "/").replace('"""', "'''")
