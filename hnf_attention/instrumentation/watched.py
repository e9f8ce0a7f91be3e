"""A model and the handles that measure it: each of its attention calls goes to all of them."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from ..errors import let_out, report
from ..names import named_modules, unwrapped
from ..tracing import captured
from . import forwards, observer
from .call import EAGER, FIRST_IN_CAPTURE, AttentionCall
from .compiled import layers
from .expected import Plain
from .forwards import Forwards
from .graph_reader import GraphReader
from .keeping import Described, Keeper, KeptForward, Pending
from .layer_state import KeptLayers
from .measurement import Forward, Measurement
from .padding import Padding
from .patches import Patch, all_or_none, release_all

_log = logging.getLogger("hnf_attention")


class Member(observer.Observer, Protocol):
    """One handle of a model.

    mode: as for `instrument`. on_forward_begin, on_forward_end: get each forward of the model when it begins, and when
    it has ended. on_kept: gets the calls that were kept, of one forward at a time. kept_layers: of which layers not.
    padding: which queries of its calls are padding. graphs: as for `Instrumentation`.
    """

    mode: str
    graphs: GraphReader | None
    on_forward_begin: Callable[[Forward], None] | None
    on_forward_end: Callable[[Forward], None] | None
    on_kept: Callable[[KeptForward], None] | None
    kept_layers: KeptLayers
    padding: Padding

    @property
    def holder(self) -> Any:
        """Whose `restore()` ends the handle: a monitor, an analyzer, or the handle itself."""

    def describe_kept(
        self, layer: str, number: int, describe: Callable[[], AttentionCall], output: Any
    ) -> Described | None:
        """The description of a call that gave `output`, and its tensors; None for a call that is not kept."""

    def note_graphed(self, layer: str, interceptor: str, merged: bool) -> None:
        """As in `observer.ModelObserver`."""

    def restore(self) -> None:
        """End the handle."""


class Watched:
    """The observer of a model's modules. It hands calls on to its members, of which at most one computes outputs.

    It lives as long as its members hold it, and keeps neither them nor the model alive.
    """

    def __init__(self, model: nn.Module):
        self.root = weakref.ref(model)
        self.forwards = Forwards(self._forward_began, self._forward_ended)
        self._keeper = Keeper(self._deliver)
        self._keeps: weakref.ref[Member] | None = None
        self._members: dict[int, weakref.ref[Member]] = {}
        self._attended: set[str] = set()  # layers of which a call was measured
        self._registered: list[weakref.ref[nn.Module]] = []
        self._patches: list[Patch] = []
        self._lock = threading.RLock()

    @staticmethod
    def of(model: nn.Module) -> Watched:
        """The one of this model, or a new one. Raises ValueError if another model has some of its modules."""
        model = unwrapped(model)
        known = watched_by(model)
        if known is not None and known.root() is model:
            return known
        for name, module in named_modules(model):
            if observer.owner(module) is not None:
                raise ValueError(
                    f"expected a model that is not instrumented as a part of another, got one whose module {name!r} "
                    "is; call hnf_attention.restore(model) first, which ends what measures it"
                )
        return Watched(model)

    @property
    def members(self) -> list[Member]:
        """Those alive, in the order in which they joined."""
        with self._lock:
            return [member for reference in self._members.values() if (member := reference()) is not None]

    def join(self, member: Member) -> dict[str, nn.Module]:
        """Take in a member. Returns the model's modules by name."""
        model = self.root()
        assert model is not None  # whoever makes a handle holds it
        modules = dict(named_modules(model))
        with self._lock:
            if not self._members:
                with all_or_none():
                    self._patches += forwards.install(model, self.forwards)
            self._members[id(member)] = weakref.ref(member)
            self._registered = [weakref.ref(module) for module in modules.values()]
            observer.register(modules, self)
        return modules

    def leave(self, identity: int) -> None:
        """Let the member of this id go. After the last one, the modules and their class are as before."""
        with self._lock:
            self._members.pop(identity, None)
            self.renew_keeping()
            self._keeper.forget()
            if self._members:
                self.renew_graphs()
                return
            for reference in self._registered:
                module = reference()
                if module is not None:
                    observer.forget(module)
                    layers.unmark(module)
            self._registered.clear()
            model = self.root()
            if model is not None:
                forwards.uninstall(model)
            release_all(self._patches)

    def _measuring(self) -> list[Member]:
        """Who measures now; the one that computes outputs comes first."""
        found = [member for reference in list(self._members.values()) if (member := reference()) is not None]
        found = [member for member in found if member.measuring]
        return found if len(found) < 2 else sorted(found, key=lambda member: member.mode == "probe")

    @property
    def measuring(self) -> bool:
        return bool(self._measuring())

    def attend(self, layer: str, describe: Callable[[], AttentionCall], original: Callable[[], Any]) -> Any:
        members = self._measuring()
        if layer not in self._attended:
            if captured():  # a first call compiles and loads kernels, which would break the capture
                for member in members:
                    member.note(layer, FIRST_IN_CAPTURE)
                return original()
            self._attended.add(layer)
        for member in members:
            original = partial(member.attend, layer, describe, original)
        return original()

    @property
    def keeping(self) -> bool:
        return self._keeps is not None

    def renew_keeping(self) -> None:
        """Find out anew whether a member keeps calls."""
        keeps = [member for member in self.members if member.keeping]
        self._keeps = weakref.ref(keeps[0]) if keeps else None

    @property
    def graph_reader(self) -> GraphReader | None:
        # A graph has one place for each layer, and takes all queries.
        members = self.members
        if len(members) != 1 or members[0].padding.query_mask is not None:
            return None
        return members[0].graphs

    @property
    def in_forward(self) -> bool:
        return self.forwards.is_running

    def renew_graphs(self) -> None:
        """Have compiled graphs look up anew who reads what they measure."""
        modules = [module for reference in self._registered if (module := reference()) is not None]
        layers.mark_compiled(modules)

    def keep(
        self,
        layer: str,
        invocation: observer.Invocation | None,
        describe: Callable[[], AttentionCall],
        plain: Plain | None,
        output: Any,
    ) -> None:
        member = None if self._keeps is None else self._keeps()  # it describes for all
        if member is None or member.kept_layers.rests(layer):
            return
        try:
            place = self.forwards.kept(layer, invocation)
            if place[0].training:
                if plain is not None and member.padding.known:
                    plain = None  # which queries are padding has to be asked in the order of the calls
                make = partial(member.describe_kept, layer, place[1], describe, output)
                self._keeper.add(place, layer, plain, make, output)
        except Exception as error:  # the monitor never ends a run
            let_out(error)
            member.kept_layers.fail(layer, error)

    def _deliver(self, kept: KeptForward) -> None:
        for member in self.members:
            if not member.keeping or member.on_kept is None or member.kept_layers.rests(kept.calls[0].layer):
                continue
            try:
                with self._lock:
                    member.on_kept(kept)
            except Exception as error:  # the monitor never ends a run
                let_out(error)
                self._keeper.forget()  # these layers rest for some calls
                for call in kept.calls:
                    member.kept_layers.fail(call.layer, error)
                _log.debug("hnf-attention: no extremes were taken of these calls", exc_info=True)
            else:
                member.kept_layers.succeed(call.layer for call in kept.calls)

    def observe(
        self, layer: str, interceptor: str, measure: Callable[[], Measurement], place: str = EAGER
    ) -> None:
        for member in self._measuring():
            member.observe(layer, interceptor, measure, place)

    def left_out(self, layer: str, query: Tensor) -> Tensor | None:
        """Of the first handle that measures."""
        member = next(iter(self._measuring()), None)
        return None if member is None else member.left_out(layer, query)

    def note(self, layer: str, reason: str) -> None:
        for member in self._measuring():
            member.note(layer, reason)

    def note_slowed(self, layer: str) -> None:
        for member in self._measuring():
            member.note_slowed(layer)

    def note_graphed(self, layer: str, interceptor: str, merged: bool) -> None:
        for member in self.members:
            member.note_graphed(layer, interceptor, merged)

    def note_failed(self, layer: str, reason: str) -> None:
        for member in self.members:
            member.note(layer, reason)

    def note_ungraphed(self, layer: str, reason: str) -> None:
        for member in self.members:
            member.kept_layers.reasons[layer] = reason

    def doubt(self, layer: str, kind: str, reason: str | None) -> None:
        for member in self._measuring():
            member.doubt(layer, kind, reason)

    def is_named(self, module: nn.Module) -> bool:
        return any(member.is_named(module) for member in self._measuring())

    def _forward_began(self, forward: Forward, pending: Pending) -> None:
        keeps = None if self._keeps is None else self._keeps()
        if keeps is not None and forward.training and not keeps.padding.known:
            pending.expected = self._keeper.expected()
        for member in self.members:
            if member.on_forward_begin is not None:
                try:
                    member.on_forward_begin(forward)
                except Exception as error:  # the monitor never ends a run
                    report("on_forward_begin failed", error)

    def _named_modules(self) -> dict[str, nn.Module]:
        model = self.root()
        return {} if model is None else dict(named_modules(model))

    def _forward_ended(self, forward: Forward, pending: Pending) -> None:
        if pending.calls or pending.expected is not None:
            try:
                self._keeper.finish(forward, pending, self._named_modules)
            except Exception as error:  # the monitor never ends a run
                report("the calls of a forward could not be read", error)
        for member in self.members:
            if member.on_forward_end is not None:
                try:
                    member.on_forward_end(forward)
                except Exception as error:  # the monitor never ends a run
                    report("on_forward_end failed", error)


def watched_by(module: nn.Module) -> Watched | None:
    """What watches this module, None if nothing does."""
    owner = observer.owner(module)
    return owner.observer if owner is not None and isinstance(owner.observer, Watched) else None


def restore(model: nn.Module) -> None:
    """End every instrumentation, monitor, analyzer and `QKClip` of `model`, or of a model that shares modules with it.

    The model and every replaced function are as before. Nothing happens where nothing measures the model. No handle is
    needed: in a notebook, the last error may keep one alive that has no name any more.

    Raises TypeError if `model` is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module, got {type(model).__name__}")
    for _, module in named_modules(model):
        watched = watched_by(module)
        for member in [] if watched is None else watched.members:
            member.holder.restore()
            member.restore()
