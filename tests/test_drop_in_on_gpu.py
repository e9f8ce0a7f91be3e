"""The drop-ins on a card: half precision, kernels, Inductor, CUDA graphs."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hnf_attention import AttentionStabilityMonitor, instrument
from hnf_attention.nn import GroupedQueryAttention, QKNorm, row_stats, swap_attention

pytestmark = pytest.mark.gpu
B, M, E = 2, 200, 256


class Block(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        if isinstance(self.attention, nn.MultiheadAttention):
            return self.attention(x, x, x, need_weights=False)[0]
        return self.attention(x)


def made(kind, dtype=torch.bfloat16):
    torch.manual_seed(0)
    if kind == "multihead":
        attention = nn.MultiheadAttention(E, 4, batch_first=True)
        swap_attention(attention)
    else:
        options = (
            {"qk_norm": QKNorm(), "window_size": 50, "sinks": True} if kind == "window" else {"softcap": 20.0}
        )
        attention = GroupedQueryAttention(E, 4, 2, **options)
    return Block(attention).to("cuda", dtype)


def step(model, x):
    out = model(x)
    return out, *torch.autograd.grad(out.float().square().sum(), [x, *model.parameters()])


KINDS = pytest.mark.parametrize("kind", ["multihead", "window", "softcap"])


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_double(kind, dtype):
    model = made(kind, dtype)
    x = torch.randn(B, M, E, device="cuda", dtype=dtype, requires_grad=True)
    found, rows = step(model, x), row_stats(model.attention)
    exact = step(model.double(), x.detach().double().requires_grad_())
    for a, b in zip(found, exact):
        assert (a.double() - b).norm() <= 3e-2 * b.norm()
    torch.testing.assert_close(
        rows.entropy.double(), row_stats(model.attention).entropy.double(), atol=2e-2, rtol=0
    )


@KINDS
def test_inductor_keeps_one_graph_and_the_statistics(kind):
    model = made(kind)
    x = torch.randn(B, M, E, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    expected, rows = step(model, x), row_stats(model.attention)
    fast = torch.compile(model, fullgraph=True)
    for a, b in zip(step(fast, x), expected):
        assert (a - b).float().norm() <= 2e-2 * b.float().norm()
    assert row_stats(model.attention) is not rows
    torch.testing.assert_close(row_stats(model.attention).entropy, rows.entropy, atol=1e-2, rtol=0)


@KINDS
def test_cuda_graphs_replay_under_a_monitor(kind):
    model = made(kind)
    fast = torch.compile(model, mode="reduce-overhead")
    monitor = AttentionStabilityMonitor(fast, log_every=2)
    for number in range(6):
        x = torch.randn(B, M, E, device="cuda", dtype=torch.bfloat16)
        torch.compiler.cudagraph_mark_step_begin()
        model.zero_grad()  # gradients lie in the memory of the graphs, which the next step writes to
        fast(x).float().square().mean().backward()
        diagnosis = monitor.on_step()
        assert (diagnosis is not None) == (number % 2 == 1)
    assert "attention" in diagnosis.to_dict()["layers"]
    assert row_stats(model.attention).entropy.isfinite().all()
    monitor.restore()


@KINDS
def test_autocast_and_checkpoints(kind):
    model = made(kind, torch.float32)
    x = torch.randn(B, M, E, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        out = model(x)
        again = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    rows = row_stats(model.attention)
    (wanted,) = torch.autograd.grad(out.float().square().sum(), x)
    (found,) = torch.autograd.grad(again.float().square().sum(), x)
    assert torch.equal(again, out) and torch.equal(found, wanted)
    assert row_stats(model.attention) is rows


def test_nothing_waits_for_the_card():
    models = [made(kind) for kind in ("multihead", "window", "softcap")]
    x = torch.randn(B, M, E, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for model in models:
        step(model, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for model in models:
            step(model, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["GptOssForCausalLM", "Gemma3ForCausalLM", "LlamaForCausalLM"])
def test_a_model_of_transformers_trains_as_with_eager(name):
    pytest.importorskip("transformers")
    import test_transformers_attention as on_cpu

    given = {key: x.cuda() for key, x in on_cpu.batch("left").items()}
    kept, losses = given["attention_mask"].bool(), []
    for implementation in ("eager", on_cpu.NAME):
        model = on_cpu.build(name, implementation).to("cuda", torch.bfloat16).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        with instrument(model) as handle:
            for _ in range(3):
                logits = model(**given).logits[kept].float()
                loss = logits.square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        assert not handle.coverage.not_measured
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=5e-2)


def test_modules_obey_the_choice_of_kernels():
    model = made("multihead")
    x = torch.randn(B, M, E, device="cuda", dtype=torch.bfloat16)
    with sdpa_kernel(SDPBackend.MATH):
        plain = nn.MultiheadAttention.forward(model.attention, x, x, x, need_weights=False)[0]
        torch.testing.assert_close(model(x), plain, atol=2e-2, rtol=2e-2)
    assert row_stats(model.attention) is not None
