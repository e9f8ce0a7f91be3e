"""FlexAttention: its masks and score functions are honoured exactly, its callers are found or listed."""

import functools
import inspect
import sys

import numpy as np
import pytest
import torch
import transformers
from flex_calls import CASES, alibi, bent, block_mask, causal, check, document, statistics, tensors
from torch import nn
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import flex_attention as by_name
from transformers.integrations import flex_attention as transformers_flex

from hnf_attention import AttentionStabilityMonitor, instrument
from hnf_attention.instrumentation import flex_call, scores
from hnf_attention.reference import masks

pytestmark = pytest.mark.usefixtures("unfused")

compiled_before = torch.compile(by_name, backend="eager")
HERE = sys.modules[__name__]
TOKENS = torch.randint(0, 40, (2, 20), generator=torch.Generator().manual_seed(0))
PADDING = (torch.arange(20) < torch.tensor([[20], [13]])).long()


@pytest.fixture
def unfused(monkeypatch):
    """Without the compiler that flex_attention starts for itself, which takes seconds; the same operator runs."""
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


class FlexAttention(nn.Module):
    def forward(self, *args, **kwargs):
        return flex.flex_attention(*args, **kwargs)


class ByName(nn.Module):
    def forward(self, *args, **kwargs):
        return by_name(*args, **kwargs)


class Compiled(nn.Module):
    def forward(self, *args, **kwargs):
        return compiled_before(*args, **kwargs)


class OfClass(nn.Module):
    flex = staticmethod(compiled_before)

    def forward(self, *args, **kwargs):
        return self.flex(*args, **kwargs)


class OwnAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.function = compiled_before

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


@pytest.mark.parametrize(
    ("chunks", "kv_heads"),
    [
        ("one", 2),
        ("of a mask that is written out", 4),
        ("without a mask that is", 2),
        pytest.param("one", 4, marks=pytest.mark.slow),
        pytest.param("of a mask that is written out", 2, marks=pytest.mark.slow),
        pytest.param("without a mask that is", 4, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_statistics_are_those_of_the_modified_scores(case, kv_heads, chunks, monkeypatch):
    if chunks != "one":
        monkeypatch.setattr(masks, "CHUNK_ELEMENTS", 26 * 8 * 7)
    if chunks == "without a mask that is":
        monkeypatch.setattr(flex_call, "MASK_ELEMENTS", 0)
    score_mod, mask_mod = CASES[case]
    query, key, value = tensors(kv_heads)
    options = dict(score_mod=score_mod, enable_gqa=kv_heads == 2, scale=0.5)
    options["block_mask"] = None if mask_mod is None else block_mask(mask_mod)
    model = FlexAttention()
    plain = model(query, key, value, **options)
    with instrument(model, mode="fused", strict=True) as handle:
        assert torch.equal(model(query, key, value, **options), plain)
    check(handle.latest[""], statistics(query, key, score_mod, mask_mod, 0.5))
    torch.testing.assert_close(handle.latest[""].query_norm, query.square().sum((2, 3)).sqrt())
    keys = key.repeat_interleave(4 // kv_heads, 1)
    torch.testing.assert_close(handle.latest[""].key_norm, keys.square().sum((2, 3)).sqrt())
    assert handle.coverage.measured[""] == "probe: flex_attention keeps its own output (flex_attention)"


@pytest.mark.parametrize("score_mod", [None, alibi])
def test_a_sample_takes_its_rows(score_mod):
    query, key, value = (torch.randn(2, 4, 300, 8) for _ in range(3))
    mask = flex.create_block_mask(causal, None, None, 300, 300, device="cpu")
    model, seen = FlexAttention(), set()
    expected = statistics(query, key, score_mod, causal)
    with instrument(model, sample=3) as handle:
        for _ in range(3):
            model(query, key, value, score_mod=score_mod, block_mask=mask)
            measurement = handle.latest[""]
            assert measurement.sample_period == 3
            rows = measurement.rows.row_index
            check(measurement, expected, rows)
            assert (measurement.visible_keys[rows < 0] == 0).all()
            seen |= set(rows[1, 2].tolist())
    assert seen == set(range(-1, 300)) and "1/3 of the rows" in handle.coverage.measured[""]


@pytest.mark.parametrize("make", [ByName, Compiled, OfClass, type("Inherited", (OfClass,), {})])
def test_functions_that_files_and_classes_hold(make):
    places = [(HERE, "by_name"), (HERE, "compiled_before"), (OfClass, "flex"), (flex, "flex_attention")]
    before = [inspect.getattr_static(*place) for place in places]
    model, (query, key, value) = make(), tensors()
    plain = model(query, key, value, score_mod=alibi, block_mask=block_mask(document))
    with instrument(model, strict=True) as handle, instrument(make()) as other:
        out = model(query, key, value, score_mod=alibi, block_mask=block_mask(document))
        assert torch.equal(out, plain)
        other.restore()
        calls = []
        handle.on_measure = calls.append
        model(query, key, value, alibi, block_mask(document))
    assert len(calls) == 1 and not other.latest
    check(calls[0], statistics(query, key, alibi, document))
    for place, value in zip(places, before):
        now = inspect.getattr_static(*place)
        assert getattr(now, "__func__", now) is getattr(value, "__func__", value)


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.own, self.of_class = OwnAttention(), OfClass()

    def forward(self, *args):
        return self.own(*args) + self.of_class(*args)


def test_functions_that_a_module_holds_are_measured_and_put_back():
    model, args = Both(), tensors()
    model.plain, held = FlexAttention(), model.own.function
    model.plain.function = by_name
    model.plain.forward = lambda *args: model.plain.function(*args)
    model.forward = lambda *args: model.own(*args) + model.of_class(*args) + model.plain(*args)
    plain = model(*args)
    with instrument(model, strict=True) as handle:
        assert torch.equal(model(*args), plain)
        assert list(handle.coverage.measured) == ["own", "of_class", "plain"]
        for measurement in handle.latest.values():
            check(measurement, statistics(*args[:2]))
    assert model.own.function is held and model.plain.function is by_name


def test_a_partial_that_a_module_holds_is_listed():
    model = OwnAttention()
    model.function = functools.partial(compiled_before, scale=0.5)
    with instrument(model, strict=True), pytest.raises(RuntimeError, match="partial of flex_attention"):
        model(*tensors())


def test_one_compiled_while_instrumented_is_not_measured_and_works_ever_after():
    query, key, value = tensors()
    with instrument(FlexAttention()):
        compiled = torch.compile(flex.flex_attention, backend="eager", fullgraph=True)
        out = compiled(query, key, value, score_mod=alibi)
    torch.testing.assert_close(out, flex.flex_attention(query, key, value, score_mod=alibi))
    assert torch.equal(compiled(query, key, value, score_mod=alibi), out)


def test_what_is_returned_beside_the_output_is_passed_on(device):
    model, args = FlexAttention(), [x.to(device) for x in tensors()]
    there = device == "cuda"  # on a CPU there is nothing that could be asked for
    options = dict(block_mask=block_mask(document).to(device), kernel_options={"BLOCK_M": 32})
    options["return_aux"] = flex.AuxRequest(lse=there, max_scores=there)
    plain, wanted = model(*args, **options)
    with instrument(model) as handle:
        out, aux = model(*args, **options)
    assert torch.equal(out, plain) and isinstance(aux, flex.AuxOutput)
    if there:
        assert torch.equal(aux.lse, wanted.lse)
        torch.testing.assert_close(handle.latest[""].rows.lse, aux.lse)
        torch.testing.assert_close(handle.latest[""].rows.max_logit, aux.max_scores)


@pytest.mark.gpu
def test_compiled_kernels_train_as_before_and_agree_on_what_they_return():
    compiled = torch.compile(flex.flex_attention)
    HERE.compiled_before, before = compiled, compiled_before
    try:
        query, key, value = (
            torch.randn(2, 4, 512, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for _ in range(3)
        )
        mask = flex.create_block_mask(causal, None, None, 512, 512, device="cuda")
        for options in ({"block_mask": mask}, {"block_mask": mask, "score_mod": alibi}, {"score_mod": bent}):
            options["return_aux"] = flex.AuxRequest(lse=True)
            model, results = Compiled(), []
            for mode in (None, "auto"):
                handle = instrument(model, mode=mode, strict=True) if mode else None
                out, aux = model(query, key, value, **options)
                results.append([out, *torch.autograd.grad(out.float().square().sum(), (query, key, value))])
            assert all(torch.equal(a, b) for a, b in zip(*results))
            torch.testing.assert_close(handle.latest[""].rows.lse, aux.lse, atol=2e-2, rtol=1e-2)
            handle.restore()
    finally:
        HERE.compiled_before = before


def test_compiled_kernels_skip_blocks_that_the_unfused_implementation_does_not():
    blocks = torch.tensor([1, 2])[None, None], torch.tensor([[0, 0], [0, 1]])[None, None]
    mask = flex.BlockMask.from_kv_blocks(*(x.int() for x in blocks), BLOCK_SIZE=16, seq_lengths=(30, 26))
    for make, keys in ((Compiled, [16, 26]), (FlexAttention, [26, 26])):
        for score_mod in (None, alibi):
            model = make()
            with instrument(model) as handle:
                model(*tensors(), score_mod=score_mod, block_mask=mask)
            visible = handle.latest[""].visible_keys.expand(2, 4, 30)
            assert (visible[..., :16] == keys[0]).all() and (visible[..., 16:] == keys[1]).all()


def test_compiled_kernels_do_not_ask_the_mask_in_full_blocks():
    every = torch.tensor([2, 2])[None, None], torch.tensor([[0, 1], [0, 1]])[None, None]
    none = torch.zeros(1, 1, 2), torch.zeros(1, 1, 2, 2)
    numbers = [x.int() for x in (*none, *every)]
    mask = flex.BlockMask.from_kv_blocks(*numbers, BLOCK_SIZE=16, mask_mod=causal, seq_lengths=(30, 26))
    model = Compiled()
    with instrument(model) as handle:
        model(*tensors(), block_mask=mask)
    assert (handle.latest[""].visible_keys == 26).all()


def test_keys_that_all_sequences_share():
    query, key, value = tensors()
    key, value = key[:1], value[:1]
    model = FlexAttention()
    with instrument(model, strict=True) as handle:
        model(query, key, value, block_mask=block_mask(document))
    check(handle.latest[""], statistics(query, key.expand(2, -1, -1, -1), None, document))


def test_what_would_take_too_long_is_listed(monkeypatch):
    monkeypatch.setattr(scores, "MOST_SCORES", 2 * 4 * 30 * 26 - 1)
    model = FlexAttention()
    with instrument(model) as handle:
        model(*tensors(), score_mod=alibi)
        assert "its 6,240 scores pass through functions" in handle.coverage.not_measured[""]
        assert not handle.coverage.measured
        model(*tensors(), block_mask=block_mask(causal))  # not a lasting reason
    assert list(handle.coverage.measured) == [""]


def test_a_function_that_cannot_be_evaluated_costs_the_call_and_nothing_else(caplog):
    times = []

    def once(score, b, h, i, j):
        times.append(1)
        if len(times) > 1:
            raise ArithmeticError("only once")
        return score

    model, args = FlexAttention(), tensors()
    with instrument(model) as handle:
        assert torch.equal(model(*args, score_mod=once), flex.flex_attention(*args))
        assert "measuring failed: ArithmeticError: only once" in handle.coverage.not_measured[""]
        assert not handle.coverage.measured and "could not measure" in caplog.text
        model(*args)
    assert handle.coverage.measured and not handle.coverage.not_measured


SMALL = dict(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=16)
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, num_key_value_heads=2),
    "mistral": lambda: transformers.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=5),
    "gemma2": lambda: transformers.Gemma2Config(
        **SMALL, num_key_value_heads=2, head_dim=8, sliding_window=5, attn_logit_softcapping=0.1
    ),
    "bert": lambda: transformers.BertConfig(**SMALL),
}


@pytest.fixture
def uncompiled(monkeypatch):
    def call(query, key, value, training=False, **options):
        return flex.flex_attention(query, key, value, **options)

    def make(_compile=False, **options):
        return flex.create_block_mask(**options)

    monkeypatch.setattr(transformers_flex, "compile_friendly_flex_attention", call)
    monkeypatch.setattr(transformers.masking_utils, "create_block_mask", make)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face_models(family):
    torch.manual_seed(0)
    config = FAMILIES[family]()
    model = transformers.AutoModel.from_config(config, attn_implementation="flex_attention").eval()
    attend = transformers.AttentionInterface()["flex_attention"]
    with torch.no_grad():
        plain = model(TOKENS, attention_mask=PADDING).last_hidden_state
        with instrument(model, strict=True) as through_flex:
            out = model(TOKENS, attention_mask=PADDING).last_hidden_state
        model.set_attn_implementation("eager")
        with instrument(model, strict=True) as eager:
            model(TOKENS, attention_mask=PADDING)
    assert torch.equal(out, plain) and transformers.AttentionInterface()["flex_attention"] is attend
    assert set(through_flex.coverage.measured.values()) == {"probe (transformers flex_attention)"}
    real = PADDING.bool()[:, None].expand(2, 4, 20)
    for ours, theirs in zip(through_flex.latest.values(), eager.latest.values(), strict=True):
        for name in ("lse", "entropy", "max_logit", "min_logit"):
            torch.testing.assert_close(getattr(ours.rows, name)[real], getattr(theirs.rows, name)[real])
        assert torch.equal(*(m.visible_keys.expand(real.shape)[real] for m in (ours, theirs)))


@pytest.mark.usefixtures("uncompiled")
def test_masks_and_biases_that_hugging_face_adds():
    query, key, value = tensors()
    hidden = torch.arange(26) % 5 == 2
    mask = torch.zeros(2, 1, 30, 26).masked_fill(hidden, -torch.inf)
    bias = torch.randn(2, 4, 30, 26).masked_fill(hidden, -torch.inf)

    class Caller(nn.Module):
        def forward(self, mask, **options):
            interface = transformers.AttentionInterface()["flex_attention"]
            return interface(self, query, key, value, mask, **options)[0]

    def added(s, b, h, i, j):
        return 2.0 * torch.tanh(s / 2.0) + mask + bias

    def biased(s, b, h, i, j):
        return s + bias

    model = Caller()
    with instrument(model, strict=True) as handle:
        model(mask, softcap=2.0, position_bias=bias)
        check(handle.latest[""], statistics(query, key, added))
        model(block_mask(document), position_bias=bias)
        check(handle.latest[""], statistics(query, key, biased, document))
        model(torch.ones(2, 1, 30, 26, dtype=torch.bool))  # is added, as 1
        check(handle.latest[""], statistics(query, key, lambda s, *_: s + 1))
    with instrument(model) as handle:
        model(None, head_mask=torch.ones(2, 4, 1, 1))  # transformers 4 adds it to the scores
        assert "a head_mask was given" in handle.coverage.not_measured[""]


@pytest.mark.parametrize("score_mod", [None, alibi])
def test_a_monitored_model_is_judged(score_mod):
    model, (query, key, value) = FlexAttention(), tensors()
    with AttentionStabilityMonitor(model, log_every=1) as monitor:
        for _ in range(2):
            model(30 * query, key, value, score_mod=score_mod)
            diagnosis = monitor.on_step()
    heads = diagnosis.stats[""]
    assert any(issue.issue_type == "entropy_collapse" for issue in diagnosis.issues)
    assert (heads.log2_curvature > 0).all()
    for bound in (
        heads.error_bound,
        heads.required_bits,
    ):  # of what a function makes of scores, none is proved
        assert (~np.isfinite(bound) if score_mod else np.isfinite(bound)).all()
