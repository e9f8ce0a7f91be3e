"""Forwards that make the calls of the forward before: kept by their tensors alone, with the same results."""

import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from test_every_step import DEVICE, HEADS, WIDTH, Model, batch
from torch import nn
from torch.nn import functional

from hnf_attention import AttentionStabilityMonitor, instrument
from hnf_attention.instrumentation.keeping import Keeper


@pytest.fixture
def described(monkeypatch):
    """The layers of the calls that were not kept as expected, in their order."""
    found, add = [], Keeper.add
    monkeypatch.setattr(Keeper, "add", lambda self, *rest: (found.append(rest[1]), add(self, *rest))[1])
    return found


class Changing(nn.Module):
    """Layers that a forward takes in the order it is told, each with what it is told beside its input."""

    def __init__(self, layers=3):
        super().__init__()
        self.layers = nn.ModuleList(Model(layers=1).layers[0] for _ in range(layers))
        self.changes = {}

    def forward(self, x, order=(0, 1, 2)):
        for place in order:
            change = self.changes.get(place)
            if change == "spoil":
                self.layers[place].spoil = ("key", 1)
            if change == "raise":
                raise RuntimeError("a layer that fails")
            with torch.set_grad_enabled(change != "no grad"):
                y = self.layers[place](x)
            self.layers[place].spoil = None
            x = x + torch.nan_to_num(y)
        return x


FORWARDS = {
    "the same": [{}] * 5,
    "another order": [{}, {}, {"order": (0, 2, 1)}, {"order": (0, 2, 1)}, {}, {}],
    "fewer layers": [{}, {}, {"order": (0, 1)}, {}, {}, {"order": ()}, {}, {}],
    "more calls": [
        {"order": (0,)},
        {"order": (0,)},
        {"order": (0, 0)},
        {"order": (0, 0)},
        {"order": (0, 1, 0)},
    ],
    "lengths": [{"length": n} for n in (40, 40, 24, 40, 24, 24, 40)],
    "a spoiled key": [{}, {}, {"changes": {1: "spoil"}}, {}, {}],
    "a layer that raises": [{}, {}, {"changes": {2: "raise"}}, {}, {}, {"changes": {0: "raise"}}, {}],
    "a layer without grad": [{}, {}, {"changes": {1: "no grad"}}, {}, {}],
    "a forward without grad": [{}, {}, {"grad": False}, {}, {}],
    "autocast": [{}, {}, {"autocast": True}, {"autocast": True}, {}],
}


NUMBERS = ["between_max_logit", "between_logit_range", "first_nonfinite_step", "first_nonfinite_forward"]
NUMBERS += [f"first_nonfinite_{name}" for name in ("query", "key", "value", "out")]


def extremes(forwards):
    """NUMBERS of every layer after such forwards, one step each, and the outputs."""
    torch.manual_seed(0)
    model, outputs = Changing().to(DEVICE), []
    with AttentionStabilityMonitor(model, log_every=len(forwards) + 1) as monitor:
        for number, told in enumerate([*forwards, {}]):
            torch.manual_seed(number)
            model.changes = told.get("changes", {})
            x = batch(told.get("length", 40))
            try:
                with (
                    torch.set_grad_enabled(told.get("grad", True)),
                    torch.autocast(DEVICE, torch.bfloat16, enabled=told.get("autocast", False)),
                ):
                    outputs.append(model(x, told.get("order", (0, 1, 2))))
                outputs[-1].sum().backward() if outputs[-1].requires_grad else None
            except RuntimeError as error:
                assert "a layer that fails" in str(error)
            monitor.on_step()
        (snapshot,) = monitor.history
    return {
        layer: np.stack([getattr(stats, name) for name in NUMBERS])
        for layer, stats in snapshot.layers.items()
    }, outputs


QUICK = ("another order", "a spoiled key", "a layer that raises")


@pytest.mark.parametrize(
    "name", [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in FORWARDS]
)
def test_results_are_those_of_calls_that_are_described_anew(name, monkeypatch):
    found, outputs = extremes(FORWARDS[name])
    monkeypatch.setattr(Keeper, "expected", lambda self: None)
    wanted, same = extremes(FORWARDS[name])
    assert found.keys() == wanted.keys() and len(found) == 3
    # A forward of which some calls are expected is handed on in two parts, which take other rows.
    first = NUMBERS.index("first_nonfinite_step") if name == "more calls" else 0
    for layer, numbers in found.items():
        np.testing.assert_array_equal(numbers[first:], wanted[layer][first:], err_msg=layer)
    assert all(torch.equal(a, b) for a, b in zip(outputs, same))


def test_a_training_step_describes_its_calls_once(described):
    model = Model().to(DEVICE)
    with AttentionStabilityMonitor(model, log_every=4) as monitor:
        for step in range(1, 9):
            described.clear()
            model(batch()).sum().backward()
            monitor.on_step()
            assert described == (["layers.0", "layers.1", "layers.2"] if step == 1 else []), step


def test_a_call_that_was_overwritten_is_left_out_alone():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.overwrites = nn.ModuleList(nn.Identity() for _ in range(2)), False

        def forward(self, x):
            for place, layer in enumerate(self.layers):
                q = layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) * 1
                x = x + functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)
                if self.overwrites and place == 0:
                    with torch.no_grad():
                        q.fill_(torch.nan)
            return x

    model = Overwrites().to(DEVICE)
    x = torch.randn(1, 24, WIDTH, device=DEVICE, requires_grad=True)
    with AttentionStabilityMonitor(model, log_every=5) as monitor:
        for step in range(1, 6):
            model.overwrites = step == 3
            model(x)
            monitor.on_step()
        (snapshot,) = monitor.history
    assert all(np.isnan(stats.first_nonfinite_query).all() for stats in snapshot.layers.values())


def test_threads_have_forwards_of_their_own(described):
    model = Model().to(DEVICE)
    with AttentionStabilityMonitor(model, log_every=100):
        for _ in range(2):
            model(batch()).sum().backward()
        described.clear()
        threads = [threading.Thread(target=lambda: model(batch()).sum().backward()) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not described


class Twice(nn.Module):
    """Layers a and b; a runs as often as it is told."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (Model(layers=1).layers[0] for _ in range(2))

    def forward(self, x, times=1):
        for _ in range(times):
            x = self.a(x)
        return self.b(x)


@contextmanager
def keeping(model, take):
    """The model, whose kept calls go to `take`."""
    with instrument(model) as handle:
        handle.measuring, handle.on_kept, handle.keeping = False, take, True
        yield handle


def test_calls_are_numbered_as_if_nothing_was_expected():
    model, seen = Twice().to(DEVICE), []
    with keeping(model, lambda kept: seen.append([(call.layer, call.call) for call in kept.calls])):
        for times in (1, 1, 2):
            seen.clear()
            model(batch(), times)
    assert sum(seen, []) == [("a", 0), ("a", 1), ("b", 0)]


def test_a_reader_that_fails_is_asked_ever_more_rarely():
    tries = []

    def take(kept):
        tries.append(kept)
        raise RuntimeError("a reader that fails")

    model = Twice().to(DEVICE)
    with keeping(model, take):
        for _ in range(60):
            model(batch())
    assert 3 <= len(tries) <= 12


def test_an_interrupt_where_a_forward_begins_ends_the_forward():
    def began(forward):
        raise KeyboardInterrupt

    model, seen = Twice().to(DEVICE), []
    with keeping(model, seen.append) as handle:
        model(batch())
        handle.on_forward_begin = began
        with pytest.raises(KeyboardInterrupt):
            model(batch())
        handle.on_forward_begin = None
        seen.clear()
        for _ in range(3):
            model(batch())
    assert len(seen) == 3


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_leaves_the_forward_as_it_is():
    class Nests(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Model(layers=1).layers[0]
            self.nests = False

        def forward(self, x):
            if self.nests:
                q = torch.nested.nested_tensor([torch.randn(4, n, 8) for n in (3, 5)]).requires_grad_()
                return functional.scaled_dot_product_attention(q, q, q)
            return self.inner(x)

    model = Nests()
    with keeping(model, lambda kept: None):
        for nests in (False, False, True, False):
            model.nests = nests
            model(batch().cpu())


def test_threads_keep_the_calls_of_their_own_layers():
    model, seen = Twice().to(DEVICE), []
    with keeping(model, lambda kept: seen.append([call.layer for call in kept.calls])):
        for _ in range(2):
            model(batch(), 1)
        entered, go = threading.Event(), threading.Event()
        hook = model.b.register_forward_pre_hook(lambda *_: (entered.set(), go.wait(30))[0] and None)
        thread = threading.Thread(target=model, args=(batch(),))
        thread.start()
        entered.wait(30)
        hook.remove()
        model(batch(24), 0)  # only b runs, in the meantime
        go.set()
        thread.join()
    assert seen[-2:] == [["b"], ["a", "b"]]
