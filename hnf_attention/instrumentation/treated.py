"""Changes of what single layers compute: their queries and keys pass through functions before the scores are formed.

The layer's module says by hooks of its own when it runs. The hooks stay with a copy or a pickle of the module.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from . import treating
from .interceptors import multihead, sdpa
from .patches import Patch, release_all

ATTRIBUTE = "_hnf_attention_treated"


class Change(Protocol):
    """What happens in the attention of a module. It keeps what is learned in the module, not in itself.

    name: what messages call it. sdpa_only: it needs the options of scaled_dot_product_attention. optional: a call that
        it cannot change may run as it is; of others, the module raises RuntimeError. dropout: it works with dropout.
    """

    name: str
    sdpa_only: bool
    optional: bool
    dropout: bool

    def run(
        self,
        module: nn.Module,
        attend: Callable[..., Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *rest: Any,
        **named: Any,
    ) -> Any:
        """What `attend(query, key, value, *rest, **named)` is to return, changed.

        query (B, H, M, D), key (B, H_kv, N, D), value (B, H_kv, N, D_v).
        """


class Treated:
    """The changes of one module's attention, in the order in which they are made."""

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.hooks: list[Any] = []  # handles, which stay right in a copy of the module
        self._patches: list[Patch] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"changes": self.changes, "hooks": self.hooks, "_patches": None}  # a copy installs its own

    @staticmethod
    def of(module: nn.Module) -> list[Change]:
        """The changes of a module's attention that are in force."""
        treated: Treated | None = vars(module).get(ATTRIBUTE)
        return [] if treated is None else list(treated.changes)

    @staticmethod
    def add(module: nn.Module, change: Change) -> None:
        """Change the attention of a module from its next call on."""
        treated = vars(module).get(ATTRIBUTE)
        if treated is None:
            treated = Treated()
            vars(module)[ATTRIBUTE] = treated
            treated.hooks += [
                module.register_forward_pre_hook(treated.begin),
                module.register_forward_hook(treated.end, always_call=True),
            ]
        treated.changes.append(change)
        treated.hold(module)

    @staticmethod
    def remove(module: nn.Module, change: Change) -> None:
        """Take back `add`."""
        treated: Treated = vars(module)[ATTRIBUTE]
        treated.changes.remove(change)
        if treated.changes:
            return
        del vars(module)[ATTRIBUTE]
        for hook in treated.hooks:
            hook.remove()
        release_all(treated._patches or [])  # at once, whoever else keeps this object

    def hold(self, module: nn.Module) -> None:
        """Keep the interceptors in place for as long as this object lives."""
        if self._patches is None:
            self._patches = interceptors([module])
            weakref.finalize(self, release_all, self._patches).atexit = False

    def begin(self, module: nn.Module, _: Any) -> None:
        """Hook before a call of the module."""
        if self._patches is None:
            self.hold(module)
        treating.thread.running.append(Call(module, self.changes))

    def end(self, module: nn.Module, _: Any, output: Any) -> None:
        """Hook after a call of the module, also one that raised."""
        running = treating.thread.running
        if not running or getattr(running[-1], "module", None) is not module:
            return  # the hook came while the module ran
        call: Any = running.pop()
        if output is not None and not call.changed and not all(x.optional for x in self.changes):
            raise RuntimeError(
                f"expected {type(module).__name__} to compute its attention by scaled_dot_product_attention or by a "
                f"function of transformers, where {', '.join(x.name for x in self.changes)} is applied, got a call "
                "of it that does not (need_weights=True of nn.MultiheadAttention is one)"
            )


class Call:
    """One call of a treated module. changed: whether its attention was changed."""

    def __init__(self, module: nn.Module, changes: list[Change]):
        self.module, self.changes, self.changed = module, changes, False

    def run(self, original: Callable[..., Any], sdpa: bool, *args: Any, **named: Any) -> Any:
        """As `treating.Running.run`."""
        self.changed = True
        attend = original
        for change in reversed(self.changes):
            if change.sdpa_only and not sdpa:
                if change.optional:
                    continue
                raise RuntimeError(
                    f"expected {type(self.module).__name__} to call scaled_dot_product_attention for {change.name}, "
                    "got another attention function"
                )
            attend = partial(change.run, self.module, attend)
        return attend(*args, **named)


def interceptors(modules: Iterable[nn.Module]) -> list[Patch]:
    """Put in place the interceptors that know of changes, for the files of these modules too."""
    modules = list(modules)
    patches = [*sdpa.install(modules), *multihead.install()]
    if "transformers.modeling_utils" in sys.modules:
        from .interceptors import transformers

        patches += transformers.install(modules)
    return patches
