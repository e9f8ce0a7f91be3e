"""What is made of a user mask: once for all layers of a forward, and anew where the mask has changed."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from hnf_attention import instrument
from hnf_attention.instrumentation import call, shared_masks


class Layer(nn.Module):
    def forward(self, x, mask):
        return functional.scaled_dot_product_attention(x, x, x, mask)


class Model(nn.Module):
    """overwrite: the layers after the first see the mask with one more key hidden, in the same memory."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(4))
        self.overwrite = False

    def forward(self, x, mask):
        for layer in self.layers:
            x = layer(x, mask)
            if self.overwrite:
                mask[..., 3] = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return x


def padding(kind, hidden):
    seen = torch.ones(2, 1, 20, 20, dtype=torch.bool)
    seen[..., hidden:] = False
    if kind == torch.bool:
        return seen
    return torch.zeros(2, 1, 20, 20, dtype=kind).masked_fill(~seen, torch.finfo(kind).min)


@pytest.fixture
def made(monkeypatch):
    names = []
    hidden, keys = call.hidden, call.hidden_keys
    monkeypatch.setattr(call, "hidden", lambda *given: names.append("copy") or hidden(*given))
    monkeypatch.setattr(call, "hidden_keys", lambda *given: names.append("keys") or keys(*given))
    return names


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("overwrite", [False, True])
def test_one_mask_for_all_layers_is_looked_at_once(made, kind, overwrite):
    model, x = Model(), torch.randn(2, 2, 20, 8)
    model.overwrite = overwrite
    with instrument(model) as handle:
        model(x, padding(kind, 15))
        rows = {name: 20 - int(kept.beside.left_out[0].sum()) for name, kept in handle.latest.items()}
        assert made.count("keys") == (4 if overwrite else 1)
        assert made.count("copy") == (0 if kind == torch.bool else 4 if overwrite else 1)
        assert list(rows.values()) == ([15, 14, 14, 14] if overwrite else [15] * 4)
        model(x, padding(kind, 12))
        assert 20 - int(handle.latest["layers.0"].beside.left_out[0].sum()) == 12
    assert shared_masks._thread.made is None


def test_outside_of_a_forward_nothing_is_shared(made):
    model, x = Model(), torch.randn(2, 2, 20, 8)
    with instrument(model) as handle:
        model.layers[0](x, padding(torch.bool, 15))
        model.layers[0](x, padding(torch.bool, 15))
        assert made == ["keys", "keys"] and len(handle.latest) == 1


def test_a_mask_made_in_inference_mode():
    model, x = Model(), torch.randn(2, 2, 20, 8)
    with instrument(model) as handle, torch.inference_mode():
        model(x, padding(torch.float32, 15))
        assert len(handle.latest) == 4
