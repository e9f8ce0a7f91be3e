"""swap_attention and unswap: the same objects, the same numbers, and a reason for whatever stays."""

import pickle

import pytest
import torch
from compat_helpers import compiled
from torch import nn

from hnf_attention import MultiheadAttention, instrument
from hnf_attention.nn import GroupedQueryAttention, row_stats, swap_attention


class Sub(nn.MultiheadAttention):
    pass


class OddAttention(nn.Module):
    def forward(self, x):
        return x


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerDecoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 1)
        self.sub, self.odd = Sub(16, 4, batch_first=True), OddAttention()
        self.ours = GroupedQueryAttention(16, 4)

    def forward(self, x):
        x = self.decoder(x, x)
        return self.ours(self.sub(x, self.odd(x), x)[0])


def model():
    torch.manual_seed(0)
    return Model(), torch.randn(2, 7, 16)


LAYERS = ["decoder.layers.0.self_attn", "decoder.layers.0.multihead_attn"]


def test_modules_are_swapped_in_place_and_the_others_listed():
    net, x = model()
    expected, objects = net(x), list(map(id, (*net.modules(), *net.parameters())))
    names = list(net.state_dict())
    result = swap_attention(net)
    assert result.swapped == dict.fromkeys(LAYERS, "hnf_attention.nn.MultiheadAttention") | {
        "ours": "hnf_attention.nn.GroupedQueryAttention"
    }
    assert "subclass of nn.MultiheadAttention" in result.not_swapped["sub"]
    assert "OddAttention is neither" in result.not_swapped["odd"] and len(result.not_swapped) == 2
    assert "NOT swapped (2)" in str(result) and repr(result) == "SwappedAttention(3 swapped, 2 not swapped)"
    torch.testing.assert_close(net(x), expected)
    assert list(map(id, (*net.modules(), *net.parameters()))) == objects and list(net.state_dict()) == names
    for name in LAYERS:
        module = net.get_submodule(name)
        assert type(module) is MultiheadAttention and module.row_stats.lse.shape == (2, 4, 7)
        assert row_stats(module) is module.row_stats


def test_unswap_is_exact():
    net, x = model()
    expected = net(x)
    objects, before = list(map(id, net.parameters())), pickle.dumps(net)
    with swap_attention(net) as result:
        net(x).sum().backward()
        net.zero_grad(set_to_none=True)
        net(x)
    assert list(map(id, net.parameters())) == objects and torch.equal(net(x), expected)
    assert [type(net.get_submodule(name)) for name in LAYERS] == [nn.MultiheadAttention] * 2
    assert net.ours.row_stats is not None  # it was never swapped
    assert pickle.dumps(net) == before
    result.unswap()


def test_an_optimizer_and_hooks_go_on():
    losses = []
    for swapped in (False, True):
        net, x = model()
        optimizer, seen = torch.optim.Adam(net.parameters(), lr=1e-2), []
        net.decoder.layers[0].self_attn.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        losses.append([])
        for step in range(4):
            if swapped and step == 1:
                result = swap_attention(net)
            if swapped and step == 3:
                result.unswap()
            optimizer.zero_grad()
            loss = net(x).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.detach())
        assert len(seen) == 4
    torch.testing.assert_close(*losses)


def test_an_instrumented_model_may_be_swapped():
    net, x = model()
    with instrument(net) as handle:
        net(x)
        before = {name: handle.latest[name].rows.entropy for name in LAYERS}
        with swap_attention(net):
            net(x)
            assert all("fused (hnf_attention.nn.Multi" in handle.coverage.measured[name] for name in LAYERS)
            for name in LAYERS:
                torch.testing.assert_close(handle.latest[name].rows.entropy, before[name], atol=1e-5, rtol=0)
        net(x)
        assert all(handle.coverage.measured[name].startswith("probe (") for name in LAYERS)


def test_what_cannot_be_swapped_is_refused():
    net = nn.ModuleList([nn.MultiheadAttention(8, 2)])
    net[0].forward = lambda *_: None
    assert swap_attention(net).not_swapped == {"0": "its forward was replaced"}
    with pytest.raises(TypeError, match="to be a torch.nn.Module, got int"):
        swap_attention(3)
    assert str(swap_attention(nn.Linear(2, 2))) == "the model has no attention module"


def test_unswap_refuses_a_class_that_somebody_else_gave():
    net = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)])
    result = swap_attention(net)
    net[1].__class__ = type("Wrapped", (MultiheadAttention,), {})
    with pytest.raises(
        RuntimeError, match="expected 1 to be of the class that swap_attention gave it, got Wrapped"
    ):
        result.unswap()
    assert type(net[0]) is MultiheadAttention
    net[1].__class__ = MultiheadAttention
    result.unswap()
    assert all(type(module) is nn.MultiheadAttention for module in net)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_compiled_model_follows():
    net, x = model()
    fast = compiled(net, backend="aot_eager")
    expected = fast(x)
    with swap_attention(fast) as result:
        assert set(LAYERS) <= set(result.swapped)
        torch.testing.assert_close(fast(x), expected)
        assert all(row_stats(net.get_submodule(name)) is not None for name in LAYERS)
    torch.testing.assert_close(fast(x), expected)
    assert all(row_stats(net.get_submodule(name)) is None for name in LAYERS)
