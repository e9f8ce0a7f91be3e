"""Catches `torch.nn.attention.varlen.varlen_attn`, PyTorch's own function for packs, and `varlen_attn_out`."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

from ..call import AttentionCall
from ..flash_call import described
from ..patches import Patch, hidden, original_of
from .functions import interceptor

_MODULE = "torch.nn.attention.varlen"
_NAMES = "varlen_attn", "varlen_attn_out"
#: The words of FlashAttention for its parameters, where they differ.
_WORDS = {
    "query": "q",
    "key": "k",
    "value": "v",
    "cu_seq_q": "cu_seqlens_q",
    "cu_seq_k": "cu_seqlens_k",
    "max_q": "max_seqlen_q",
    "max_k": "max_seqlen_k",
    "scale": "softmax_scale",
    "is_causal": "causal",  # of torch 2.10
    "return_aux": "return_attn_probs",
    "enable_gqa": "pack_gqa",  # the shapes say it
}


def install(modules: Collection[nn.Module]) -> list[Patch]:
    """Replace the functions, wherever they are held, until the patches are released."""
    replacements = {
        function: functools.partial(interceptor, name, _describer(name, function))
        for name, function in _functions().items()
    }
    return Patch.of_functions(replacements, modules)


def unreachable(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Why modules that hold such a function out of reach are not measured, by their names."""
    return hidden(modules, list(_functions().values()))


def _functions() -> dict[str, Callable[..., Any]]:
    module = sys.modules.get(_MODULE)
    return {name: original_of(getattr(module, name)) for name in _NAMES if hasattr(module, name)}


def _describer(name: str, function: Callable[..., Any]) -> Callable[..., AttentionCall]:
    own = inspect.signature(function)
    parameters = [x.replace(name=_WORDS.get(word, word)) for word, x in own.parameters.items()]
    signature = own.replace(parameters=parameters)

    def describe(*args: Any, **kwargs: Any) -> AttentionCall:
        return described(name, signature, *args, **{_WORDS.get(word, word): x for word, x in kwargs.items()})

    return describe
