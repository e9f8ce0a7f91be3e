"""QK-clip after every optimizer step: what it holds, what it leaves alone, what it refuses."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
import transformers
from attention_layers import GPT2, LLAMA, TOKENS, Multihead, PlainBlock, Strange, changed, weights
from leftovers import leave_nothing_behind  # noqa: F401
from odd_layers import Biased, Fused, Separate, normed
from torch import nn
from torch.utils.checkpoint import checkpoint

from hnf_attention import AttentionStabilityMonitor, instrument
from hnf_attention.engine import engines
from hnf_attention.engine.sizes import bounds_of_sizes
from hnf_attention.interventions import QKClip
from hnf_attention.interventions.sizes import MOST_REST


def sizes(model, run, measure="range", grad=False):
    """The exact size of each head, by layer."""
    with instrument(model, mode="probe") as handle, torch.set_grad_enabled(grad):
        run()
    rows = {layer: x.rows for layer, x in handle.latest.items()}
    parts = {n: r.max_logit - (r.min_logit if measure == "range" else 0) for n, r in rows.items()}
    return {layer: part.amax((0, 2)) for layer, part in parts.items()}


def loud(module, factor=12.0):
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if any(word in name for word in ("qkv.w", "q_proj.w", "k_proj.w", "c_attn.w", "in_proj_w")):
                parameter.mul_(factor)
    return module


X = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(0))
MODELS = {
    "fused": lambda: nn.Sequential(loud(Fused())),
    "fused, by a softmax of its own": lambda: nn.Sequential(loud(Fused(softmax=True))),
    "grouped keys": lambda: nn.Sequential(loud(Separate(groups=2))),
    "multihead": lambda: nn.Sequential(loud(Multihead())),
}


@pytest.mark.parametrize(
    ("build", "measure"),
    [
        pytest.param(
            build,
            measure,
            id=f"{name}-{measure}",
            marks=() if (number % 2 == 0) == (measure == "range") else pytest.mark.slow,
        )
        for number, (name, build) in enumerate(MODELS.items())
        for measure in ("range", "max_logit")
    ],
)
def test_a_step_brings_exactly_the_heads_over_the_limit_to_it(build, measure):
    torch.manual_seed(0)
    model = build()
    before = next(iter(sizes(model, lambda: model(X), measure).values()))
    threshold = float(before.sort().values[1:3].mean())  # two heads above, two below
    old = weights(model)
    clip = QKClip(model, threshold, measure)
    for _ in range(2):  # the second time, the way of measuring is chosen
        model.load_state_dict(old)
        model(X).sum().backward()
        clip.step()
        after = next(iter(sizes(model, lambda: model(X), measure).values()))
        torch.testing.assert_close(after, before.clamp(max=threshold), rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.tensor(next(iter(clip.sizes.values()))), before, rtol=1e-4, atol=0)
    clip.remove()


def test_heads_below_the_limit_keep_every_bit_and_the_bound_stands_for_them():
    torch.manual_seed(0)
    model = nn.Sequential(Fused())
    old, clip = weights(model), QKClip(model, 2.5 * sizes_by_bound(model), within_step=False)
    exact = sizes(model, lambda: model(X))["0"]
    for step in range(3):
        model(X).sum().backward()
        clip.step()
        found = torch.tensor(clip.sizes["0"])
        assert (found >= exact * (1 - 1e-5)).all()
        assert torch.allclose(found, exact, rtol=1e-4) == (step == 0)
    assert not changed(old, weights(model))


@pytest.mark.parametrize("far", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_layer_that_jumps_over_the_limit_is_clipped_at_its_next_look(far):
    """In the same step, unless it was so far below that it was left alone."""
    torch.manual_seed(0)
    model = nn.Sequential(Fused())
    bound = sizes_by_bound(model)
    limit = bound * (300 if far else 2.5)
    clip = QKClip(model, limit, within_step=False)
    for _ in range(3):
        model(X).sum().backward()
        clip.step()
    loud(model, 90.0)
    assert sizes(model, lambda: model(X))["0"].max() > 10 * limit
    clipped_after = 0
    while sizes(model, lambda: model(X))["0"].max() > limit:
        clipped_after += 1
        model(X).sum().backward()
        clip.step()
        assert clipped_after < 10
    assert clipped_after <= MOST_REST if far else clipped_after == 1
    model(X).sum().backward()
    clip.step()
    assert sizes(model, lambda: model(X))["0"].max() <= limit * 1.001


def sizes_by_bound(model):
    found = []
    with instrument(model, mode="probe") as handle, torch.no_grad():
        handle.on_measure = found.append
        model(X)
    bounds = bounds_of_sizes(found[0].query, found[0].key, found[0].options.scale, "range")
    assert (bounds >= sizes(model, lambda: model(X))["0"]).all()
    return float(bounds.max())


def test_a_key_bias_triggers_nothing_but_for_max_logit():
    for measure, clipped in (("range", False), ("max_logit", True)):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(GPT2).eval()
        with torch.no_grad():
            model.transformer.h[0].attn.c_attn.bias[32:64] += 5000.0
        old, clip = weights(model), QKClip(model, 100.0, measure)
        for _ in range(2):
            model(TOKENS, labels=TOKENS).loss.backward()
            clip.step()
        assert bool(changed(old, weights(model))) == clipped
        clip.remove()


def test_a_bias_on_the_scores_is_left_out():
    model = nn.Sequential(Biased())
    with torch.no_grad():
        model[0].slopes.fill_(50.0)  # distances of up to 19 make ranges of 950
    old, clip = weights(model), QKClip(model, 100.0)
    model(X).sum().backward()
    clip.step()
    assert changed(old, weights(model)) <= {"0.qkv.weight", "0.qkv.bias"}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(31, 32), nn.Linear(32, 31)
        self.blocks = nn.ModuleList(Fused(is_causal=True) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(2))
        self.kept = {}  # how its blocks are checkpointed

    def forward(self, x):
        x = self.embed(x)
        for block, norm in zip(self.blocks, self.norms):
            x = x + (checkpoint(block, norm(x), **self.kept) if self.kept else block(norm(x)))
        return self.out(x)


def largest_ranges(kind, threshold, **options):
    """What the softmax saw in each step's forward, beside an optimizer whose rate is far too high."""
    torch.manual_seed(0)
    model = Net()
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "blocks" in n]
    rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
    first = {
        "adamw": lambda: torch.optim.AdamW(matrices, lr=0.5, foreach=False),
        "adamw, foreach": lambda: torch.optim.AdamW(matrices, lr=0.5, foreach=True),
        "muon": lambda: torch.optim.Muon(matrices, lr=3.0, weight_decay=0.0),
    }[kind]()
    optimizers = [first, torch.optim.AdamW(rest, lr=0.01)]
    clip = None if threshold is None else QKClip(model, threshold, **options).attach(first)
    seen = []
    with instrument(model, mode="probe") as handle:
        for _ in range(120 if kind == "muon" else 100):
            x = torch.randint(0, 31, (4, 12)).repeat(1, 2)
            loss = F.cross_entropy(model(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten())
            rows = [found.rows for found in handle.latest.values()]
            seen.append(max(float((r.max_logit - r.min_logit).max()) for r in rows))
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
    if clip is not None:
        clip.remove()
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "adamw, foreach", "muon"])
def test_it_holds_every_head_beside_an_optimizer_that_passes_ten_thousand(kind, monkeypatch):
    # In plain PyTorch: three hundred steps of interpreted kernels take minutes, and tests/test_sizes.py compares them.
    monkeypatch.setattr(engines, "KERNEL_DTYPES", ())
    free, held = largest_ranges(kind, None), largest_ranges(kind, 100.0)
    after = largest_ranges(kind, 100.0, within_step=False)
    assert max(free) > 10_000
    assert max(held) <= 100.01  # with the defaults, at every step
    assert 100.01 < max(after[5:]) < 700  # what one step at that rate adds to 100


def test_within_the_step_leaves_what_is_below_and_evaluation_alone():
    torch.manual_seed(0)
    model = nn.Sequential(Fused()).train()
    clip = QKClip(model, 1e6)
    expected = model(X)
    for _ in range(2):
        model(X).sum().backward()
        clip.step()
    assert torch.equal(model(X), expected)
    loud(model, 30.0)
    plain = nn.Sequential(Fused())
    plain.load_state_dict(model.state_dict())
    clip.threshold = 50.0
    clip.remove()
    clip = QKClip(model, 50.0)
    model(X).sum().backward()
    clip.step()
    model.load_state_dict(plain.state_dict())
    model.eval()
    assert torch.equal(model(X), plain(X))
    model.train()
    assert sizes(model, lambda: model(X))["0"].max() > 100  # without grad it is an evaluation
    assert sizes(model, lambda: model(X), grad=True)["0"].max() <= 50.01
    model(X).sum().backward()
    clip.step()
    model.eval()
    assert sizes(model, lambda: model(X))["0"].max() <= 50.01
    clip.remove()
    assert not any(hook for hook in model[0]._forward_hooks.values())


@pytest.mark.parametrize("shape", [(0, 20, 32), (2, 0, 32)])
@pytest.mark.parametrize("within_step", [True, False])
def test_an_empty_batch_ends_no_step(shape, within_step, caplog):
    model = nn.Sequential(loud(Fused(), 2.0))
    clip = QKClip(model, 50.0, within_step=within_step)
    for x in (X, torch.zeros(shape), X):
        model(x).sum().backward()
        clip.step()
    assert clip.steps == 3 and not clip.refused and not caplog.records
    clip.remove()


def test_attached_it_runs_after_each_step_and_beside_a_monitor():
    torch.manual_seed(0)
    model = nn.Sequential(loud(Fused()))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    with AttentionStabilityMonitor(model, log_every=1) as monitor:
        clip = QKClip(model, 30.0).attach(optimizer)
        for _ in range(3):
            model(X).sum().backward()
            optimizer.step()
            diagnosis = monitor.on_step()
        assert diagnosis.stats["0"].logit_range_max.max() <= 30.01
        assert clip.steps == 3
    model(X).sum().backward()
    optimizer.step()
    assert clip.steps == 4
    clip.remove()
    optimizer.step()
    assert clip.steps == 4


@pytest.mark.slow
def test_a_compiled_model_is_clipped():
    torch.manual_seed(0)
    model = nn.Sequential(loud(Fused()), loud(Fused()))
    compiled = torch.compile(model, backend="eager")
    clip = QKClip(compiled, 30.0)
    for _ in range(3):
        compiled(X).sum().backward()
        clip.step()
    assert max(float(found.max()) for found in sizes(model, lambda: model(X)).values()) <= 30.01


def test_llama_in_bf16_under_a_checkpoint():
    torch.manual_seed(0)
    model = loud(transformers.LlamaForCausalLM(LLAMA).bfloat16(), 30.0)
    old_name = getattr(model, "gradient_checkpointing_enable", None)  # until transformers 6
    getattr(model, "activation_checkpointing_enable", old_name)({"use_reentrant": False})
    clip = QKClip(model, 50.0)
    layer = "model.layers.0.self_attn"
    for _ in range(3):
        model(TOKENS, labels=TOKENS).loss.backward()
        clip.step()
    old_name = getattr(model, "gradient_checkpointing_disable", None)
    getattr(model, "activation_checkpointing_disable", old_name)()
    assert sizes(model, lambda: model(TOKENS))[layer].max() <= 50.5  # two roundings of bf16


def test_evaluation_and_non_finite_scores_clip_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(loud(Fused()))
    clip = QKClip(model, 30.0)
    model(X).sum().backward()
    clip.step()
    old = weights(model)
    with torch.no_grad():
        model(1000 * X)
    clip.step()
    model(X * torch.nan).sum().backward()
    clip.step()
    assert not changed(old, weights(model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_computes_the_same_twice_within_the_step(reentrant):
    """Its first pass runs without grad, and is part of the training all the same."""
    torch.manual_seed(0)
    model = Net()
    found = []
    for checkpointed in (False, True):
        copied = copy.deepcopy(model)
        with torch.no_grad():
            for block in copied.blocks:
                block.qkv.weight[:64] *= 12
        clip = QKClip(copied, 20.0)
        if checkpointed:
            copied.kept = {"use_reentrant": reentrant}
        for _ in range(3):
            copied.zero_grad()
            with torch.no_grad():
                for block in copied.blocks:
                    block.qkv.weight[:64] *= 1.5
            out = copied(torch.arange(24).view(2, 12))
            out.square().mean().backward()
            clip.step()
        found.append((out, [p.grad for p in copied.parameters()]))
        clip.remove()
    torch.testing.assert_close(found[0], found[1])


def test_what_cannot_be_clipped_is_refused(caplog):
    model = nn.Sequential(loud(Fused()), Fused(inside=normed))
    clip = QKClip(model, 30.0)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            model(X).sum().backward()
            clip.step()
    assert list(clip.refused) == ["1"] and "stay as they are" in clip.refused["1"]
    assert caplog.text.count("QK-clip leaves layer 1 alone") == 1
    clip.remove()
    alone = nn.Sequential(Fused(inside=normed))
    clip = QKClip(alone, 30.0)
    alone(X).sum().backward()
    with pytest.raises(ValueError, match="a layer that QK-clip can treat, got none .*stay as they are"):
        clip.step()
    clip = QKClip(nn.ModuleDict({"a": Strange(q=nn.Linear(2, 2))}), 30.0)
    with pytest.raises(RuntimeError, match="expected a training forward .* got none whose attention"):
        clip.step()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (dict(threshold=0), ValueError, "threshold to be a number > 0, got 0"),
        (dict(measure="max"), ValueError, "measure in .*'range', 'max_logit'.*got 'max'"),
        (dict(model=3), TypeError, "model to be a torch.nn.Module, got int"),
    ],
)
def test_wrong_arguments(given, error, message):
    with pytest.raises(error, match=message):
        QKClip(**{"model": nn.ModuleDict({"a": PlainBlock("qkv")}), **given})


def test_masters_in_the_optimizer_are_refused():
    model = nn.Sequential(loud(Fused())).bfloat16()
    masters = [nn.Parameter(p.detach().float()) for p in model.parameters()]
    clip = QKClip(model, 30.0).attach(torch.optim.AdamW(masters))
    model(X.bfloat16()).sum().backward()
    with pytest.raises(ValueError, match="master weights would undo the change"):
        clip.step()
    with pytest.raises(TypeError, match="expected a torch.optim.Optimizer, got str"):
        clip.attach("adam")
