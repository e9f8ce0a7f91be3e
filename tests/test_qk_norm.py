"""QK-norm started in a trained model: the scores after, the gains, what is refused, and the way back."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
import transformers
from attention_layers import GPT2, LLAMA, SIZES, TOKENS, Multihead, changed, weights
from leftovers import leave_nothing_behind  # noqa: F401
from odd_layers import Cross, Fused, Separate, WithModule, rotated
from torch import nn

from hnf_attention import AttentionStabilityMonitor, instrument
from hnf_attention.interventions import start_qk_norm

X = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(0))
t = transformers


def hugging_face(config, cls, **options):
    def build():
        model = cls._from_config(copy.deepcopy(config), **options) if options else cls(config)
        return model.train(), lambda m: m(TOKENS)[0]

    return build


MODELS = {
    "fused": lambda: (nn.Sequential(Fused()), lambda m: m(X)),
    "rotary": lambda: (nn.Sequential(Fused(inside=rotated)), lambda m: m(X)),
    "grouped, repeated": lambda: (nn.Sequential(Separate(groups=2)), lambda m: m(X)),
    "multihead": lambda: (nn.Sequential(Multihead()), lambda m: m(X)),
    "llama, grouped": hugging_face(LLAMA, t.LlamaForCausalLM),
    "llama, eager": hugging_face(LLAMA, t.LlamaForCausalLM, attn_implementation="eager"),
}


@pytest.fixture(params=MODELS)
def model_and_run(request):
    torch.manual_seed(0)
    model, run = MODELS[request.param]()
    return model, run


@pytest.mark.parametrize("least, most", [(0.0, 8.0), (0.5, 8.0), (0.01, 0.02)])
def test_gains_start_between_their_bounds(least, most):
    torch.manual_seed(0)
    model = nn.Sequential(Fused())
    with torch.no_grad():
        model[0].qkv.weight.mul_(torch.tensor([0.1, 1.0, 10.0, 0.3]).repeat(3).repeat_interleave(8)[:, None])
        query, key, _ = model[0].parts(X)
    start = start_qk_norm(model, torch.optim.AdamW(model.parameters()), least=least, most=most)
    model(X)
    for gain, x in zip(start.gains, (query, key)):
        torch.testing.assert_close(gain.detach(), rms(x).mean((0, 2)).clamp(least, most))


@pytest.mark.parametrize("least", [-0.1, 9.0, True, "0"])
def test_wrong_bounds_of_gains(least):
    model = nn.Sequential(Fused())
    with pytest.raises(ValueError, match="least to be a number from 0 to most"):
        start_qk_norm(model, torch.optim.AdamW(model.parameters()), least=least)


def measured(model, run):
    seen = []
    with instrument(model, mode="probe") as handle, torch.no_grad():
        handle.on_measure = seen.append
        run(model)
    (found,) = seen
    return found


def rms(x):
    return x.float().square().mean(-1).sqrt()


def test_queries_and_keys_get_the_length_that_they_had_on_average(model_and_run):
    model, run = model_and_run
    with torch.no_grad():  # heads of different sizes
        for name, p in model.named_parameters():
            if any(word in name for word in ("qkv.w", "q_proj.w", "in_proj_w")):
                p[:8] *= 3.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before, names = measured(model, run), set(model.state_dict())
    start = start_qk_norm(model, optimizer)
    first = run(model)
    (module,) = start.layers.values()
    assert start.started
    assert {n.rpartition(".")[2] for n in set(model.state_dict()) - names} == {"qk_norm_query", "qk_norm_key"}
    torch.testing.assert_close(
        module.qk_norm_query.detach(), rms(before.query).mean((0, 2)), rtol=1e-4, atol=0
    )
    after = measured(model, run)
    gain = module.qk_norm_query.detach()[None, :, None].expand(rms(after.query).shape)
    torch.testing.assert_close(rms(after.query), gain, rtol=1e-3, atol=0)
    assert rms(after.key).std(2).max() < 1e-3 < rms(before.key).std(2).max()
    assert torch.equal(first, run(model))  # the first forward is normed already
    direction = F.cosine_similarity(after.query, before.query, dim=-1)
    torch.testing.assert_close(direction, torch.ones_like(direction))
    key_heads = 2 if len(module.qk_norm_key) == 2 else 4
    assert (key_heads == 2) == isinstance(module, Separate | t.models.llama.modeling_llama.LlamaAttention)


def test_gains_are_learned_and_revert_is_exact(model_and_run):
    model, run = model_and_run
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
    run(model).square().mean().backward()
    optimizer.step()
    old, expected = weights(model), run(model).detach()
    groups = [list(group["params"]) for group in optimizer.param_groups]
    start = start_qk_norm(model, optimizer)
    run(model)
    start.revert()
    assert torch.equal(run(model), expected) and not changed(old, weights(model))
    assert all(len(a) == len(b["params"]) for a, b in zip(groups, optimizer.param_groups))
    start.revert()
    start = start_qk_norm(model, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        run(model).square().mean().backward()
        before = [gain.detach().clone() for gain in start.gains]
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, start.gains))
    start.revert()
    assert set(model.state_dict()) == set(old) and len(optimizer.state) == len(list(model.parameters()))


def test_long_keys_cannot_make_scores_large():
    torch.manual_seed(0)
    model = nn.Sequential(Fused())
    with torch.no_grad():
        model[0].qkv.weight.mul_(100.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    start_qk_norm(model, optimizer, forward=lambda: model(X))
    found = measured(model, lambda m: m(X))
    assert model[0].qk_norm_query.max() == 8.0  # the most
    assert found.rows.max_logit.max() <= 8 * 8 * 8**0.5 * 1.001


def test_a_checkpoint_is_resumed():
    def fresh():
        torch.manual_seed(0)
        model = nn.Sequential(Fused(), Fused())
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()

    model, optimizer = fresh()
    step(model, optimizer)
    start_qk_norm(model, optimizer)
    for _ in range(2):
        step(model, optimizer)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    other, its = fresh()
    start_qk_norm(other, its, gains=saved["model"])
    other.load_state_dict(saved["model"])
    its.load_state_dict(saved["optimizer"])
    assert torch.equal(model(X), other(X))
    for _ in range(2):
        step(model, optimizer)
        step(other, its)
    assert not changed(weights(model), weights(other))


def test_copies_and_pickles_keep_the_norm():
    torch.manual_seed(0)
    model = nn.Sequential(Fused())
    start = start_qk_norm(model, torch.optim.SGD(model.parameters(), lr=0.1))
    expected = model(X)
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    plain = nn.Sequential(Fused())
    plain.load_state_dict({n: p for n, p in model.state_dict().items() if "qk_norm" not in n})
    start.revert()
    assert torch.equal(model(X), plain(X)) and not torch.allclose(model(X), expected)
    del start
    assert torch.equal(twin(X), expected) and torch.equal(loaded(X), expected)


def test_it_is_seen_by_a_monitor_whichever_came_first():
    for monitor_first in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(Fused())
        with torch.no_grad():
            model[0].qkv.weight[:32].mul_(1000.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        monitor = AttentionStabilityMonitor(model, log_every=1) if monitor_first else None
        start = start_qk_norm(model, optimizer, forward=lambda model=model: model(X))
        monitor = monitor or AttentionStabilityMonitor(model, log_every=1)
        model(X).sum().backward()
        diagnosis = monitor.on_step()
        assert diagnosis.stats["0"].logit_range_max.max() < 60  # of 1000 and more without
        monitor.restore()
        start.revert()


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_a_checkpoint(reentrant):
    from torch.utils.checkpoint import checkpoint

    def gradients(checkpointed):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 32), Fused())
        start_qk_norm(model, torch.optim.SGD(model.parameters(), lr=0.1))

        def run():
            hidden = model[0](X)
            return checkpoint(model[1], hidden, use_reentrant=reentrant) if checkpointed else model[1](hidden)

        model.forward = lambda: run()
        for _ in range(2):
            model.zero_grad()
            model().square().sum().backward()
        return {n: p.grad for n, p in model.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    assert "1.qk_norm_query" in plain
    torch.testing.assert_close(plain, checkpointed)


def test_a_failed_forward_leaves_nothing_running():
    torch.manual_seed(0)
    model = nn.Sequential(Fused())
    start_qk_norm(model, torch.optim.SGD(model.parameters(), lr=0.1), forward=lambda: model(X))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(X[..., :3])
    q = torch.randn(1, 4, 5, 8)
    assert torch.equal(F.scaled_dot_product_attention(q, q, q), F.scaled_dot_product_attention(q, q, q))
    from hnf_attention.instrumentation import treating

    assert not treating.thread.running


def test_an_interrupted_forward_changes_no_other_attention():
    def interrupt(*_):
        raise KeyboardInterrupt

    torch.manual_seed(0)
    model, q = nn.Sequential(Fused()), torch.randn(1, 4, 5, 8)
    expected = F.scaled_dot_product_attention(q, q, q)
    start = start_qk_norm(model, torch.optim.SGD(model.parameters(), lr=0.1), forward=lambda: model(X))
    hook = next(m for m in model[0].modules() if isinstance(m, nn.Linear)).register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(X)
    hook.remove()
    assert torch.equal(F.scaled_dot_product_attention(q, q, q), expected)
    start.revert()
    assert torch.equal(F.scaled_dot_product_attention(q, q, q), expected)


@pytest.mark.slow
def test_a_compiled_model_needs_a_forward_and_is_normed():
    torch.manual_seed(0)
    model = nn.Sequential(Fused(), Fused())
    compiled = torch.compile(model, backend="eager")
    before = compiled(X)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="expected forward=.* for a compiled model, got None"):
        start_qk_norm(compiled, optimizer)
    start = start_qk_norm(compiled, optimizer, forward=lambda: compiled(X))
    assert len(start.layers) == 2
    torch.testing.assert_close(compiled(X), model(X))
    assert not torch.allclose(compiled(X), before)
    compiled(X).sum().backward()
    assert all(gain.grad is not None for gain in start.gains)
    with torch.no_grad():
        model[0].qk_norm_query.fill_(3.0)
    with instrument(compiled, mode="probe") as handle:
        compiled(X)
    assert set(handle.latest) == {"0", "1"}
    lengths = handle.latest["0"].query_norm / (20 * 8) ** 0.5
    torch.testing.assert_close(lengths, torch.full_like(lengths, 3.0), rtol=1e-3, atol=0)


def test_what_is_refused():
    torch.manual_seed(0)
    normed = nn.Sequential(WithModule("q_norm", nn.RMSNorm(8)))
    optimizer = torch.optim.SGD(normed.parameters(), lr=0.1)
    before = set(normed.state_dict())
    with pytest.raises(
        ValueError, match="got none in its forward; refused: 0: it has QK-norm already .q_norm"
    ):
        start_qk_norm(normed, optimizer, forward=lambda: normed(X))
    written = nn.Sequential(Fused(softmax=True))
    with pytest.raises(ValueError, match="attention by scaled_dot_product_attention"):
        start_qk_norm(written, optimizer, forward=lambda: written(X))
    with pytest.raises(ValueError, match="an optimizer that the gains of QK-norm join, got None"):
        start_qk_norm(normed, None)
    with pytest.raises(ValueError, match="names of modules of the model, got .'nowhere'"):
        start_qk_norm(normed, optimizer, layers=["nowhere"])
    with pytest.raises(TypeError, match="Optimizer or a list of them, got str"):
        start_qk_norm(normed, ["adam"])
    with pytest.raises(ValueError, match="most to be a number > 0, got 0"):
        start_qk_norm(normed, optimizer, most=0)
    with pytest.raises(ValueError, match="entries named 'qk_norm_query', got none"):
        start_qk_norm(normed, optimizer, gains=normed.state_dict())
    assert set(normed.state_dict()) == before
    from hnf_attention.instrumentation import treating

    assert not treating.finders


def test_muon_alone_cannot_take_gains_and_the_other_optimizer_gets_them():
    torch.manual_seed(0)
    model = nn.Sequential(Fused())
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    muon = torch.optim.Muon(matrices, lr=0.01)
    with pytest.raises(ValueError, match="an optimizer that takes vectors for the gains .*'Muon'"):
        start_qk_norm(model, muon)
    groups = [dict(params=vectors[:1], weight_decay=0.1), dict(params=vectors[1:], weight_decay=0.0)]
    adam = torch.optim.AdamW(groups, lr=0.01)
    start = start_qk_norm(model, [muon, adam], forward=lambda: model(X))
    assert adam.param_groups[1]["params"][-2:] == start.gains and len(muon.param_groups[0]["params"]) == 2


def test_weights_of_attention_are_refused_where_the_norm_would_be_skipped():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(32, 4, batch_first=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start_qk_norm(model, optimizer, forward=lambda: model(X, X, X, need_weights=False))
    with pytest.raises(
        RuntimeError, match="QK-norm is applied, got a call of it that does not .need_weights=True"
    ):
        model(X, X, X)
    with torch.no_grad():  # PyTorch's inference fast path is off
        model.eval()
        torch.testing.assert_close(
            model(X, X, X, need_weights=False)[0], model.train()(X, X, X, need_weights=False)[0]
        )


def test_chosen_layers_and_other_sequences():
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.cross = Fused(), Cross()

        def forward(self, x):
            return self.cross(self.own(x), x)

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = start_qk_norm(model, optimizer, layers=["cross"])
    model(X)
    assert list(start.layers) == ["cross"] and not hasattr(model.own, "qk_norm_query")
    again = start_qk_norm(model, optimizer, layers=["own"])  # a second one stands beside the first
    model(X)
    assert list(again.layers) == ["own"]
    model(X).sum().backward()
    start.revert()
    assert hasattr(model.own, "qk_norm_query") and not hasattr(model.cross, "qk_norm_query")


@pytest.mark.slow
def test_gpt2_and_bert_of_transformers():
    for cls, config in ((t.GPT2LMHeadModel, GPT2), (t.BertModel, t.BertConfig(**SIZES))):
        torch.manual_seed(0)
        model = cls(config).train()
        start = start_qk_norm(
            model, torch.optim.SGD(model.parameters(), lr=0.1), forward=lambda m=model: m(TOKENS)
        )
        assert len(start.layers) == 1
        model(TOKENS)[0].square().mean().backward()
        assert all(gain.grad is not None for gain in start.gains)


def test_heads_that_megatron_splits_are_refused():
    model = nn.Sequential(Separate())
    model[
        0
    ].q_proj.weight.tensor_model_parallel = True  # its mark; DTensors say themselves how they are split
    expected = model(X)
    start = start_qk_norm(model, torch.optim.SGD(model.parameters(), lr=0.1))
    torch.testing.assert_close(model(X), expected, rtol=0, atol=0)
    assert not start.started
    assert "do not say how" in start.refused["0"]
    start.revert()
