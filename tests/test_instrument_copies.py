"""Copies of an instrumented model: deep, shallow, pickled, saved. They are the plain model's copies."""

import copy
import io
import pickle
import pickletools
import weakref

import pytest
import torch
import torch.nn.functional as F
from attention_models import LAYERS, Attention, Model, x
from torch import nn

from hnf_attention import instrument
from hnf_attention.instrumentation.compiled import layers


@pytest.fixture(autouse=True)
def never_compiled(monkeypatch):
    """Other tests compile models of these classes that nobody measures. Graphs of those may then run these ones."""
    monkeypatch.setattr(layers, "_unmeasured", weakref.WeakSet())


class HoldingAttention(Attention):
    """A function of PyTorch's is an attribute of it."""

    def __init__(self):
        super().__init__()
        self.activation = F.softmax

    def forward(self, inputs):
        q, k, v = self.split(inputs)
        return (self.activation(q @ k.mT, -1) @ v).transpose(1, 2).flatten(2)


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "old pickle": lambda model: pickle.loads(pickle.dumps(model, protocol=2)),
    "torch.save": _saved,
    "copy": copy.copy,
}


@pytest.mark.parametrize(
    ("strict", "forward_first"),
    [
        (False, True),
        (True, False),
        pytest.param(False, False, marks=pytest.mark.slow),
        pytest.param(True, True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("make", [Model, HoldingAttention])
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_the_plain_models(way, make, strict, forward_first):
    model, inputs = make(), x()
    plain = model(inputs)
    with instrument(model, strict=strict) as handle:
        if forward_first:
            model(inputs)
        handle.latest.clear()
        copied = COPIES[way](model)
        for _ in range(2):
            assert torch.equal(copied(inputs), plain)
        if way != "copy":  # which has the very submodules of the model
            assert not handle.latest and all(hook(copied, (), None) is None for hook in _hooks(copied))
            assert b"hnf_attention" not in pickle.dumps(model)
            with instrument(copied, strict=strict) as of_copy:
                copied(inputs)
            assert of_copy.coverage.measured.keys() == of_copy.latest.keys() != set()
        model(inputs)
        assert list(handle.latest) == (LAYERS if make is Model else [""])
    assert torch.equal(copied(inputs), plain) and not model._forward_hooks


def _hooks(model):
    return list(model._forward_hooks.values())


def test_a_model_without_strict_is_pickled_byte_for_byte_as_before():
    model = HoldingAttention()
    before = pickletools.optimize(pickle.dumps(model))
    with instrument(model):
        model(x())
        assert pickletools.optimize(pickle.dumps(model)) == before


def test_softmax_is_reached_where_a_module_holds_it():
    model = nn.Sequential(HoldingAttention())
    with instrument(model, strict=True) as handle:
        model(x())
    assert list(handle.coverage.measured.items()) == [("0", "probe (softmax)")]
