"""This project's attention under `scaled_dot_product_attention`, in place of PyTorch's FlashAttention (torch >= 2.11).

```python
import hnf_attention.integrations.torch_sdpa as torch_sdpa

torch_sdpa.activate()  # every call of SDPA that PyTorch gives to its flash kernel on CUDA is ours from now on
torch_sdpa.deactivate()
```

Importing this registers the implementation "hnf_attention" with `torch.nn.attention.register_flash_attention_impl`, so
that `torch.nn.attention.activate_flash_attention_impl("hnf_attention")` does the same as `activate`. PyTorch chooses
the kernel of each call as before. On cards where cuDNN's attention goes first, use
`sdpa_kernel(SDPBackend.FLASH_ATTENTION)` or `torch.backends.cuda.enable_cudnn_sdp(False)`. Calls with dropout stay
PyTorch's.

The innermost module that runs keeps the statistics of its last such call: `hnf_attention.nn.row_stats(module)`. A
module inside of a compiled graph does not run, so there the compiled module keeps them. In eager mode, `instrument`
and monitors take these statistics and probe nothing.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from .. import compat
from ..engine import engines, library
from ..engine.call import BackwardInputs, Call, check
from ..instrumentation import observer
from ..nn import rows
from ..statistics.rows import RowStats
from ..tracing import running_modules

NAME = "hnf_attention"
_FORWARD, _BACKWARD = compat.flash_operators

if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
    raise ImportError(
        "expected torch >= 2.11, which has torch.nn.attention.register_flash_attention_impl, "
        f"got torch {torch.__version__}; hnf_attention.nn and instrument() need no such function"
    )


def activate() -> None:
    """Compute SDPA's flash calls on CUDA by this project, in place of the implementation that is active."""
    torch.nn.attention.activate_flash_attention_impl(NAME)


def deactivate() -> None:
    """Put PyTorch's own FlashAttention back. Nothing happens while another implementation is active."""
    if torch.nn.attention.current_flash_attention_impl() == NAME:
        torch.nn.attention.restore_flash_attention_impl()


class Registration:
    """The two operators of PyTorch as this project computes them, for as long as this object lives.

    key: the dispatch key that they are registered for.
    """

    def __init__(self, key: str = "CUDA"):
        self._theirs = {name: _kernel(name, key) for name in (_FORWARD, _BACKWARD)}
        self._library: Library | None = Library("aten", "IMPL")
        with warnings.catch_warnings():  # PyTorch warns of what is wanted here
            warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
            self._library.impl(_FORWARD, self.forward, key, with_keyset=True)
            self._library.impl(_BACKWARD, self.backward, key, with_keyset=True)

    def remove(self) -> None:
        """Put PyTorch's own kernels back."""
        self._library = None

    def forward(
        self,
        keys: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        return_debug_mask: bool = False,
        *,
        scale: float | None = None,
    ) -> Any:
        """(out, logsumexp (B, H, M) in nats, None, None, M, N, seed, offset, debug mask), as the operator returns them.

        Raises RuntimeError for dropout where PyTorch has no kernel of its own, and as `attention` does.
        """
        if dropout_p > 0 or return_debug_mask:
            given = (query, key, value, dropout_p, is_causal, return_debug_mask)
            return self._original(_FORWARD, dropout_p).call_boxed(keys, *given, scale=scale)
        call = _call(query, key, value, is_causal, scale)
        with torch.no_grad():
            out, *numbers = engines.forward(call)
        found = RowStats.unpack(*numbers)
        if compat.running_backward() == -1:  # elsewhere it is the second forward of a checkpoint
            observer.thread.slot_rows = found
            module = next(running_modules(), None)
            if module is not None:
                rows.keep(module, found)
        seed = _seed_of(library.choice(), query.device)
        offset = torch.zeros((), dtype=torch.uint64, device=query.device)
        mask = query.new_empty(0)
        lengths = query.shape[2], key.shape[2]
        return _like(query, out), found.lse, None, None, *lengths, seed, offset, mask

    def backward(
        self,
        keys: Any,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        cum_seq_q: Tensor | None,
        cum_seq_k: Tensor | None,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        *random: Tensor,
        scale: float | None = None,
    ) -> Any:
        """The gradients of query, key and value, of a forward that was ours or PyTorch's own."""
        if dropout_p > 0:
            lengths = (cum_seq_q, cum_seq_k, max_q, max_k)
            given = (grad_out, query, key, value, out, logsumexp, *lengths, dropout_p, is_causal, *random)
            return self._original(_BACKWARD, dropout_p).call_boxed(keys, *given, scale=scale)
        call = _call(query, key, value, is_causal, scale)
        # Nobody reads the entropy without its cotangent.
        inputs = BackwardInputs(out, logsumexp, logsumexp, grad_out, None, None)
        with torch.no_grad():
            found = engines.backward(call, inputs, False, _choice_of(random[0]))
        return tuple(_like(x, gradient) for x, gradient in zip((query, key, value), found[:3]))

    def _original(self, name: str, dropout_p: float) -> Any:
        kernel = self._theirs[name]
        if kernel is None:
            raise RuntimeError(
                "expected dropout_p=0 and no debug mask where PyTorch has no flash kernel of its own, "
                f"got dropout_p={dropout_p}"
            )
        return kernel


def _kernel(name: str, key: str) -> Any:
    """PyTorch's own kernel of an operator; None if it has none for tensors of this dispatch key."""
    try:
        return torch.library.get_kernel(f"aten::{name}", key)
    except RuntimeError:
        return None


def _call(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None) -> Call:
    options = check(
        query,
        key,
        value,
        attn_mask=None,
        is_causal=is_causal,
        scale=scale,
        window_size=None,
        softcap=None,
        sinks=None,
    )
    return Call(query, key, value, options)


# The operators save tensors alone, and to read a number in one is to wait for the device. So the size of the seed's
# memory says what the user allowed when the forward ran.
_SEED = 2  # numbers that the operator's seed has


def _seed_of(chosen: library.Choice, device: torch.device) -> Tensor:
    """The operator's seed, uint64 (2,), in memory for as many numbers more as `chosen` is: 1 and its bits."""
    code = 1 + sum(bool(flag) << place for place, flag in enumerate(chosen))
    return torch.zeros(_SEED + code, dtype=torch.uint64, device=device).resize_(_SEED)


def _choice_of(seed: Tensor) -> library.Choice:
    """What `_seed_of` was given. What is in force now for the seed of another forward, and for a copy of a seed."""
    code = seed.untyped_storage().nbytes() // seed.element_size() - _SEED - 1
    flags = [bool(code >> place & 1) for place in range(len(library.Choice._fields))]
    return library.Choice(*flags) if 0 <= code < 1 << len(flags) else library.choice()


def _like(x: Tensor, result: Any) -> Tensor:
    """The result with the strides of `torch.empty_like(x)`: compiled graphs expect them."""
    wanted = torch.empty_like(x)
    return result if wanted.stride() == result.stride() else wanted.copy_(result)


torch.nn.attention.register_flash_attention_impl(NAME, register_fn=Registration)
