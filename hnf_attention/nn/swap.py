"""Swap a model's attention modules for those of this project, in place and with their trained weights, and back."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .. import compat
from ..instrumentation.coverage import is_attention
from ..instrumentation.patches import methods
from ..names import display_name, named_modules
from . import rows, transformers
from .grouped_query import GroupedQueryAttention
from .multihead import MultiheadAttention
from .sdpa import ScaledDotProductAttention

#: The name under which files of transformers hold AttentionInterface.
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"


@dataclass(repr=False)
class SwappedAttention:
    """What `swap_attention` did. `str()` is a report with one line per module.

    swapped: names of modules, and what computes their attention now. not_swapped: names of the other attention modules,
    and why they stay as they are. Names are those in the model.
    """

    swapped: Mapping[str, str]
    not_swapped: Mapping[str, str]
    _multihead: dict[str, nn.Module] = field(default_factory=dict)
    _configs: list[tuple[Any, str | None]] = field(default_factory=list)
    _keeping: list[nn.Module] = field(default_factory=list)

    def unswap(self) -> None:
        """Put everything back: the very same modules and parameters, of their old classes. A second call does nothing.

        Raises RuntimeError, before anything is changed, if a module has got another class in the meantime.
        """
        for name, module in self._multihead.items():
            if type(module) is not MultiheadAttention:
                raise RuntimeError(
                    f"expected {display_name(name)} to be of the class that swap_attention gave it, got "
                    f"{type(module).__name__}; undo that first"
                )
        for module in self._multihead.values():
            module.__class__ = nn.MultiheadAttention
        if self._multihead:
            _compile_again()
        for config, implementation in self._configs:
            compat.set_attention_implementation(config, implementation)
        for module in self._keeping:
            rows.forget(module)
        self._multihead, self._configs, self._keeping = {}, [], []

    def __enter__(self) -> SwappedAttention:
        return self

    def __exit__(self, *_: object) -> None:
        self.unswap()

    def __repr__(self) -> str:
        return f"SwappedAttention({len(self.swapped)} swapped, {len(self.not_swapped)} not swapped)"

    def __str__(self) -> str:
        width = max((len(display_name(name)) for name in (*self.swapped, *self.not_swapped)), default=0)
        lines = []
        for title, modules in (("swapped", self.swapped), ("NOT swapped", self.not_swapped)):
            if modules:
                lines.append(f"attention {title} ({len(modules)}):")
                lines += [f"  {display_name(name):<{width}}  {text}" for name, text in modules.items()]
        return "\n".join(lines) or "the model has no attention module"


def swap_attention(model: nn.Module) -> SwappedAttention:
    """Let this project compute the attention of a model's modules, which then keep `row_stats`, with trained weights.

    Modules and parameters stay the very same objects. Optimizers, hooks, state dicts and references to them go on.

    - `nn.MultiheadAttention` becomes `hnf_attention.nn.MultiheadAttention`. A subclass stays: it may compute something
      else.
    - Attention modules of transformers that look their function up in AttentionInterface get that of
      `attn_implementation="hnf_attention"`; `hnf_attention.nn.row_stats(module)` reads the statistics.

    Every other module whose class is named like attention is listed with the reason. `instrument(model)` measures most
    of these. `unswap()` of the result, or the end of a `with` block, puts everything back. Compiled graphs that hold a
    swapped module are compiled again; before torch 2.13, all graphs of the process are. Raises TypeError if `model` is
    no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module, got {type(model).__name__}")
    modules = dict(named_modules(model))
    result = SwappedAttention({}, {})
    swapped, refused = {}, {}
    for name, module in modules.items():
        if type(module) is nn.MultiheadAttention and "forward" not in vars(module):
            module.__class__ = MultiheadAttention
            result._multihead[name] = module
            result._keeping.append(module)
        if isinstance(module, (MultiheadAttention, ScaledDotProductAttention, GroupedQueryAttention)):
            swapped[name] = f"hnf_attention.nn.{type(module).__name__}"
    if result._multihead:
        _compile_again()
    why = _choose(modules, result)
    for name, module in modules.items():
        if not _looks_up(module):
            continue
        if compat.attention_implementation(module) == transformers.NAME:
            swapped[name] = f'attn_implementation="{transformers.NAME}"'
            result._keeping.append(module)
        else:
            refused[name] = why.get(
                id(module.config), "no model of transformers around it chooses its attention"
            )
    for name, module in modules.items():
        known = swapped | refused
        attends = is_attention(module) or isinstance(module, nn.MultiheadAttention)
        if name not in known and attends and not _is_around(name, known):
            refused[name] = _reason(module)
    result.swapped, result.not_swapped = swapped, refused
    return result


def _compile_again() -> None:
    """Let no compiled graph go on with the classes of before. Since torch 2.13, graphs are guarded by them."""
    if torch.__version__ < "2.13" and "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _choose(modules: Mapping[str, nn.Module], result: SwappedAttention) -> dict[int, str]:
    """Choose our implementation in the configs of transformers' models. Returns why not, by the id of a config."""
    library = sys.modules.get("transformers.modeling_utils")
    if library is None:  # no model is of transformers before it is imported
        return {}
    refused: dict[int, str] = {}
    for model in _outermost(modules, library.PreTrainedModel):
        transformers.register()
        configs = {id(config): config for config in _configs(model)}
        before = [(config, compat.attention_implementation(config)) for config in configs.values()]
        reason = "transformers cannot choose the attention of its class by AttentionInterface"
        try:
            model.set_attn_implementation(transformers.NAME)  # type: ignore[operator]
        except (ValueError, KeyError) as error:
            for config, implementation in before:
                compat.set_attention_implementation(config, implementation)
            reason = f"transformers refuses: {error}"
        result._configs += before
        refused |= dict.fromkeys(configs, reason)
    return refused


def _outermost(modules: Mapping[str, nn.Module], kind: type[nn.Module]) -> Iterator[nn.Module]:
    """The modules of this class that lie in no other of it."""
    seen: set[int] = set()
    for module in modules.values():
        if isinstance(module, kind) and id(module) not in seen:
            seen |= set(map(id, module.modules()))
            yield module


def _configs(model: nn.Module) -> Iterator[Any]:
    """The configs of a model of transformers, of its parts, and those inside of these."""
    left = [module.config for module in model.modules() if hasattr(module, "config")]
    while left:
        config = left.pop()
        yield config
        left += [
            inner for name in getattr(config, "sub_configs", ()) if (inner := getattr(config, name, None))
        ]


def _looks_up(module: nn.Module) -> bool:
    """Whether the module's own code looks an attention function of transformers up, by its config."""
    if not hasattr(module, "config") or hasattr(module, "set_attn_implementation"):
        return False
    return any(_INTERFACE in method.__code__.co_names for method in methods(type(module)))


def _is_around(name: str, others: Mapping[str, str]) -> bool:
    inside = f"{name}." if name else ""
    return any(other != name and other.startswith(inside) for other in others)


def _reason(module: nn.Module) -> str:
    kind = type(module).__name__
    if isinstance(module, nn.MultiheadAttention):
        if "forward" in vars(module):
            return "its forward was replaced"
        return f"{kind} is a subclass of nn.MultiheadAttention and may compute something else"
    return (
        f"{kind} is neither nn.MultiheadAttention nor an attention module of transformers that looks its function up "
        "in AttentionInterface"
    )
