"""Attention written by hand: caught at its softmax, measured from its scores, and left as it is."""

import pytest
import torch
import transformers
from attention_models import Attention, HandWrittenAttention, x
from sinks import sink_mass
from torch import nn

from hnf_attention import AttentionStabilityMonitor, instrument

TOKENS = torch.randint(0, 40, (2, 20), generator=torch.Generator().manual_seed(0))
PADDING = (torch.arange(20) < torch.tensor([[20], [13]])).long()
SMALL = dict(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
TOKEN_IDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
FAMILIES = {
    "bloom": lambda: transformers.BloomModel(
        transformers.BloomConfig(vocab_size=40, hidden_size=32, n_layer=2, n_head=4, **TOKEN_IDS)
    ),
    "falcon": lambda: transformers.FalconModel(transformers.FalconConfig(**SMALL, **TOKEN_IDS)),
    "mpt": lambda: transformers.MptModel(
        transformers.MptConfig(vocab_size=40, d_model=32, n_layers=2, n_heads=4, max_seq_len=64)
    ),
    "deberta-v2": lambda: transformers.DebertaV2Model(
        transformers.DebertaV2Config(**SMALL, intermediate_size=64)
    ),
    "deberta": lambda: transformers.DebertaModel(transformers.DebertaConfig(**SMALL, intermediate_size=64)),
    "gpt-neo": lambda: transformers.GPTNeoModel(
        transformers.GPTNeoConfig(
            vocab_size=40,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            window_size=5,
            attention_types=[[["global", "local"], 1]],
            **TOKEN_IDS,
        )
    ),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face_models_that_the_interface_does_not_reach(family, padded):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    keywords = {"input_ids": TOKENS, "attention_mask": PADDING if padded else torch.ones_like(TOKENS)}
    keywords["output_attentions"] = True
    plain = model(**keywords).last_hidden_state
    expected = torch.autograd.grad(plain.square().sum(), list(model.parameters()), allow_unused=True)
    with instrument(model, strict=True) as instrumentation:
        got = model(**keywords)
        gradients = torch.autograd.grad(
            got.last_hidden_state.square().sum(), list(model.parameters()), allow_unused=True
        )
    assert torch.equal(got.last_hidden_state, plain)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(gradients, expected))
    assert set(instrumentation.coverage.measured.values()) == {"probe (softmax)"}
    assert len(instrumentation.latest) == len(got.attentions) == 2
    real = keywords["attention_mask"].bool()[:, None].expand(2, 4, 20)  # padded rows hold anything
    for measurement, weights in zip(instrumentation.latest.values(), got.attentions):
        entropy = torch.special.entr(weights.double()).sum(-1)
        torch.testing.assert_close(measurement.rows.entropy.double()[real], entropy[real], atol=2e-6, rtol=0)
        torch.testing.assert_close(measurement.rows.max_weight[real], weights.amax(-1)[real])
        seen = (weights > 0) & real[..., None]
        assert torch.equal(measurement.visible_keys[real], (weights > 0).sum(-1)[real])
        torch.testing.assert_close(
            measurement.sink_mass[real].double(), sink_mass(weights, seen)[real], atol=1e-5, rtol=1e-5
        )
        assert measurement.head_dim == 8 and measurement.query_norm.isnan().all()


def test_longformer_has_its_heads_behind_its_positions():
    config = transformers.LongformerConfig(**SMALL, intermediate_size=64, attention_window=8, pad_token_id=1)
    model = transformers.LongformerModel(config).eval()
    with torch.no_grad(), instrument(model) as instrumentation:
        model(TOKENS[:, :16])
    rows = instrumentation.latest["encoder.layer.0.attention.self"].rows
    assert rows.entropy.shape == (2, 4, 16) and rows.entropy.isfinite().all()


class BatchedAttention(HandWrittenAttention):
    """Its softmax is a module of its own, its scores are (B * H, M, N), its mask is fp16's smallest number."""

    def __init__(self, masked=False):
        super().__init__()
        self.softmax, self.masked = nn.Softmax(-1), masked
        del self.heads

    def forward(self, inputs):
        parts = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in self.qkv(inputs).chunk(3, -1))
        q, k, v = (y.flatten(0, 1) for y in parts)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if self.masked:
            hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden, torch.finfo(torch.float16).min)
        return (self.softmax(scores) @ v).unflatten(0, (inputs.shape[0], -1)).transpose(1, 2).flatten(-2)


@pytest.mark.parametrize("known", [True, False])
def test_scores_of_three_dimensions_have_as_many_heads_as_rows_for_each_sequence(known):
    model, inputs = BatchedAttention(masked=True), x()
    if known:
        model.num_heads = 4
    with instrument(model) as instrumentation:
        model(inputs)
    measurement = instrumentation.latest[""]
    assert measurement.rows.lse.shape[:2] == (2, 4)
    assert torch.equal(measurement.visible_keys[0, 0], torch.arange(1, 21))


def test_statistics_are_those_of_the_same_attention_through_sdpa():
    torch.manual_seed(0)
    through_sdpa, by_hand, inputs = Attention(), HandWrittenAttention(), x()
    by_hand.load_state_dict(through_sdpa.state_dict())
    with instrument(through_sdpa) as one, instrument(by_hand) as other:
        through_sdpa(inputs)
        by_hand(inputs)
    for name in ("lse", "entropy", "max_logit", "min_logit"):
        ours, theirs = (getattr(handle.latest[""].rows, name) for handle in (one, other))
        torch.testing.assert_close(ours, theirs)


def test_non_finite_scores_are_seen():
    model, inputs = HandWrittenAttention(), x()
    inputs[0, 3] = torch.nan
    with instrument(model) as instrumentation:
        model(inputs)
    entropy = instrumentation.latest[""].rows.entropy
    assert entropy[0].isnan().all() and entropy[1].isfinite().all()


class Given(nn.Module):
    """Attention whose scores are given."""

    num_heads = 4

    def forward(self, scores):
        return scores.softmax(-1)


def _measured_of(scores):
    model = Given()
    with instrument(model, attention_classes=["Given"]) as instrumentation:
        model(scores)
    return instrumentation.latest[""]


def test_scores_in_blocks_of_queries_are_rows_of_their_heads():
    scores = torch.randn(2, 4, 3, 5, 7)  # (B, H, blocks, M, N)
    expected = _measured_of(scores.flatten(2, 3)).rows
    for blocks in (scores, scores.transpose(1, 2)):
        assert torch.equal(_measured_of(blocks).rows.entropy, expected.entropy)


@pytest.mark.parametrize("shape", [(2, 4, 4, 5, 7), (2, 3, 3, 5, 7), (2, 4, 1, 3, 5, 7)])
def test_blocks_whose_heads_cannot_be_told_are_listed_beside_what_is_measured(shape):
    model = Given()
    with instrument(model, attention_classes=[Given]) as instrumentation:
        model(torch.randn(2, 4, 5, 7))
        model(torch.randn(shape))
    assert instrumentation.coverage.measured == {"": "probe (softmax)"}
    assert f"its softmax over {shape} is its 4 heads" in instrumentation.coverage.not_measured[""]


def test_block_sparse_attention_is_measured_in_all_its_rows():
    """BigBird's takes five softmaxes, of the first, second, middle, second last and last blocks of queries."""
    torch.manual_seed(0)
    sparse = dict(attention_type="block_sparse", block_size=2, num_random_blocks=1)
    sparse |= dict(attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0, sep_token_id=3)
    config = transformers.BigBirdConfig(**SMALL, intermediate_size=64, **TOKEN_IDS, **sparse)
    # In eval mode every random block is the first one, which is then attended to twice.
    model, parts = transformers.BigBirdModel(config).train(), []
    with torch.no_grad(), instrument(model) as instrumentation:
        instrumentation.on_measure = parts.append
        weights = model(TOKENS, output_attentions=True).attentions
    assert len(parts) == 10 and not instrumentation.coverage.not_measured
    for layer, layer_weights in enumerate(weights):
        rows = torch.cat([part.rows.entropy for part in parts[5 * layer : 5 * layer + 5]], 2)
        expected = torch.special.entr(layer_weights.double()).sum(-1).float()
        torch.testing.assert_close(rows, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("mask", [-torch.inf, -1e9, -1e4, torch.finfo(torch.float32).min, -65504.0])
def test_what_models_write_for_hidden_keys(mask):
    scores = torch.randn(2, 4, 6, 9).masked_fill(torch.arange(9) > 5, mask)
    measurement = _measured_of(scores)
    assert (measurement.visible_keys == 6).all()
    assert (measurement.rows.min_logit > -10).all()


def test_scores_that_ran_away_are_no_mask():
    low = _measured_of(torch.randn(2, 4, 6, 9) - 5e4)
    assert (low.visible_keys == 9).all() and (low.rows.max_logit < -4e4).all()
    wide = _measured_of(6e4 * torch.randn(2, 4, 6, 9))
    assert (wide.visible_keys == 9).all() and (wide.rows.min_logit < -5e4).any()


class GatedAttention(Attention):
    """A softmax beside its attention, over something else of four dimensions."""

    def forward(self, inputs):
        gate = torch.ones(2, 4, 20, 2).softmax(-1)
        return super().forward(inputs) * gate.mean()


class RoutedAttention(Attention):
    def __init__(self):
        super().__init__()
        self.router = Router()

    def forward(self, inputs):
        return super().forward(inputs) * self.router(inputs).mean()


@pytest.mark.parametrize("make", [GatedAttention, RoutedAttention])
def test_a_softmax_beside_measured_attention_is_not_taken_for_it(make):
    model = make()
    with instrument(model, strict=True) as instrumentation:
        model(x())
        instrumentation.latest.clear()
        model(x())
    assert list(instrumentation.coverage.measured.values()) == ["probe (scaled_dot_product_attention)"]
    assert not instrumentation.latest[""].query_norm.isnan().any()


def test_a_forward_under_vmap_is_left_alone():
    model, inputs = HandWrittenAttention(), x()
    with instrument(model) as instrumentation:
        torch.func.vmap(model)(inputs[None])
        assert not instrumentation.latest and not instrumentation.coverage.measured
        model(inputs)
    assert list(instrumentation.latest) == [""]


def test_a_compiled_softmax_still_compiles_after_all_is_put_back():
    model, inputs = HandWrittenAttention(), x()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with instrument(model):
        compiled(inputs)
    torch.testing.assert_close(compiled(inputs), model(inputs))


class Router(nn.Module):
    """A softmax that is no attention: not named like it."""

    def forward(self, inputs):
        return inputs.softmax(-1)


class PoolingAttention(nn.Module):
    """A softmax over something else than scores."""

    def forward(self, inputs):
        return (inputs.mean(-1).softmax(-1)[..., None] * inputs).sum(1) + inputs.softmax(1).sum()


def test_other_softmaxes_are_left_alone():
    model, inputs = nn.Sequential(Router(), PoolingAttention()), x()
    expected = model(inputs)
    with instrument(model) as instrumentation:
        assert torch.equal(model(inputs), expected)
    assert not instrumentation.coverage.measured
    assert list(instrumentation.coverage.not_measured) == ["1"]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_is_recorded_once(use_reentrant):
    model, seen = HandWrittenAttention(), []
    with instrument(model) as instrumentation:
        instrumentation.on_measure = seen.append
        inputs = x(requires_grad=True)
        torch.utils.checkpoint.checkpoint(model, inputs, use_reentrant=use_reentrant).sum().backward()
    assert len(seen) == 1


def test_everything_is_put_back():
    before = torch.softmax, torch.Tensor.softmax, nn.functional.softmax
    with instrument(HandWrittenAttention()):
        assert torch.softmax is not before[0]
    assert (torch.softmax, torch.Tensor.softmax, nn.functional.softmax) == before


def test_a_monitored_model_is_judged_and_drawn(tmp_path):
    torch.manual_seed(0)
    model = HandWrittenAttention()
    monitor = AttentionStabilityMonitor(model, log_every=1)
    with torch.no_grad():
        next(model.parameters()).mul_(30.0)
        for _ in range(2):
            model(x())
            diagnosis = monitor.on_step()
    assert any(issue.issue_type == "entropy_collapse" for issue in diagnosis.issues)
    assert diagnosis.to_dict()["layers"]
    diagnosis.plot_curvature_evolution(tmp_path / "curvature.png")
    diagnosis.plot_entropy_heatmap(tmp_path / "entropy.png")
    assert "entropy_collapse" in diagnosis.summary()
