"""Replaced functions: put back exactly, never over somebody else's, nothing kept alive."""

import functools
import gc
import weakref

import attention_models
import pytest
import torch
import torch.nn.functional as F
from attention_models import LAYERS, ByNameAttention, Model, x

from hnf_attention import compat
from hnf_attention.instrumentation import instrument

ORIGINAL = F.scaled_dot_product_attention


def test_somebody_elses_patch_over_ours_stays():
    model, inputs = Model(), x()
    handle = instrument(model)
    ours = F.scaled_dot_product_attention

    @functools.wraps(ours)
    def theirs(*args, **kwargs):
        return ours(*args, **kwargs)

    @functools.wraps(ours)
    def without_ours(*args, **kwargs):
        return ORIGINAL(*args, **kwargs)

    F.scaled_dot_product_attention = theirs
    try:
        model(inputs)
        assert list(handle.latest) == LAYERS
        handle.restore()
        assert F.scaled_dot_product_attention is theirs
        handle.latest.clear()
        model(inputs)
        assert not handle.latest
        with instrument(model) as again:
            records = []
            again.on_measure = records.append
            model(inputs)
            assert len(records) == 2  # ours over theirs over ours: each call is counted once
        assert F.scaled_dot_product_attention is theirs
        F.scaled_dot_product_attention = without_ours
        with instrument(model) as again:
            model(inputs)
            assert list(again.latest) == LAYERS
        assert F.scaled_dot_product_attention is without_ours
    finally:
        F.scaled_dot_product_attention = ORIGINAL


@pytest.mark.slow
def test_nothing_is_kept_alive():
    model = Model()
    handle = instrument(model, strict=True)
    dead = weakref.ref(model)
    handle.restore()
    del model
    gc.collect()
    assert dead() is None

    model = Model()
    instrument(model)  # dropped at once: it restores itself
    gc.collect()
    assert F.scaled_dot_product_attention is ORIGINAL and not model._forward_hooks
    handle = instrument(model)
    dead = weakref.ref(model)
    del model
    gc.collect()
    assert dead() is None
    handle.restore()


@pytest.mark.parametrize("by_hand", [False, True])
def test_functions_that_a_models_file_imported_by_name(by_hand):
    names = ("sdpa_by_name", "softmax_by_name")
    before = [getattr(attention_models, name) for name in names]
    model, inputs = ByNameAttention(by_hand=by_hand), x()
    with instrument(model) as one, instrument(ByNameAttention()) as other:
        model(inputs)
        assert [getattr(attention_models, name) for name in names] != before
        other.restore()
        one.latest.clear()
        model(inputs)  # the first still holds its own
    assert list(one.latest) == [""] and not other.latest
    assert [getattr(attention_models, name) for name in names] == before
    assert "softmax" not in vars(torch.Tensor)


def test_a_garbage_collection_while_a_graph_is_traced_leaves_the_functions_until_later(monkeypatch):
    model, inputs = Model(), x()
    handle = instrument(Model())
    ours = F.scaled_dot_product_attention
    with monkeypatch.context() as tracing:
        tracing.setattr(compat, "lowered_graph", lambda: object())
        handle.restore()  # as the end of a handle that nobody holds does
        assert F.scaled_dot_product_attention is ours
    with instrument(model) as handle:
        model(inputs)
        assert list(handle.latest) == LAYERS
    assert F.scaled_dot_product_attention is ORIGINAL and "__call__" not in vars(Model)
