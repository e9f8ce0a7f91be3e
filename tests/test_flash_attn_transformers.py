"""transformers' flash_attention_2, 3 and 4 and hub kernels, padded and packed, through stand-ins of the package."""

import sys
from types import ModuleType

import flash_standins
import pytest
import torch
import transformers
from transformers import modeling_flash_attention_utils as flash_utils

from hnf_attention import AttentionAnalyzer, AttentionStabilityMonitor, instrument

SMALL = dict(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=16)
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, num_key_value_heads=2),
    "mistral": lambda: transformers.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=5),
    "gemma2": lambda: transformers.Gemma2Config(
        **SMALL, num_key_value_heads=2, head_dim=8, sliding_window=5, attn_logit_softcapping=0.5
    ),
    "gpt-oss": lambda: transformers.GptOssConfig(
        **SMALL,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=5,
        num_local_experts=2,
        num_experts_per_tok=1,
    ),
}
VERSIONS = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}
HUB = "kernels-community/flash-attn2"
TEXTS = [list(range(3, 14)), [7, 9, 2], [1] * 6 + [4, 5]]
ROWS = ("lse", "entropy", "max_logit", "min_logit")


@pytest.fixture(autouse=True)
def libraries(monkeypatch):
    made = flash_standins.put_in_place(monkeypatch)
    padding = ModuleType("flash_attn.bert_padding")
    padding.pad_input, padding.unpad_input = flash_utils._pad_input, flash_utils._unpad_input
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    for version in VERSIONS:
        monkeypatch.setattr(flash_utils, f"is_flash_attn_{version}_available", lambda *_, **__: True)
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn"):
        monkeypatch.setattr(flash_utils, name, None)
    return made


def model_of(family, implementation="eager"):
    torch.manual_seed(0)
    config = FAMILIES[family]()
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for module in model.modules():  # sinks that matter
        if hasattr(module, "sinks"):
            torch.nn.init.normal_(module.sinks)
    if implementation != "eager":
        flash_utils.lazy_import_flash_attention(implementation)
        model.config._attn_implementation = implementation  # the public way asks for a card
    return model


def alone(family):
    """The measurements of each text by itself, under eager attention: name -> layer -> (H, all)."""
    model, found = model_of(family).eval(), []
    if family != "gpt-oss":  # its experts take no fp64
        model.double()
    with instrument(model, strict=True) as handle:
        for text in TEXTS:
            with torch.no_grad():
                model(torch.tensor([text]))
            found.append({layer: one.rows for layer, one in handle.latest.items()})
    layers = list(found[0])
    return {
        name: {layer: torch.cat([getattr(x[layer], name)[0] for x in found], 1) for layer in layers}
        for name in ROWS
    }


def check(handle, expected, own=None):
    """own: boolean (B, M), the places of the texts' tokens; None for all of one row."""
    assert set(handle.latest) == set(expected["lse"])
    for layer, measurement in handle.latest.items():
        for name in ROWS:
            got = getattr(measurement.rows, name).double()
            got = got[0] if own is None else got.transpose(1, 2)[own].T
            torch.testing.assert_close(got, expected[name][layer].double(), rtol=1e-4, atol=1e-4)


def packed(separate):
    """One row with all texts, as DataCollatorWithFlattening and TRL's padding-free collators make it."""
    examples = [{"input_ids": text} for text in TEXTS]
    collator = transformers.DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=separate)
    batch = collator(examples)
    if separate:  # moving a batch makes a tensor of each
        batch["cu_seq_lens_k"] = batch["cu_seq_lens_k"].clone()
    return batch


def implementation_of(version):
    return f"flash_attention_{version}"


CASES = [(2, "llama"), (3, "llama"), (4, "llama"), (2, "mistral"), (3, "gemma2"), (4, "gpt-oss")]


EACH = [pytest.param(*case, marks=[pytest.mark.exhaustive] * (case not in CASES[::5])) for case in CASES]


@pytest.mark.slow
@pytest.mark.parametrize("separate", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("version, family", EACH)
def test_a_pack_is_measured_by_sequence(version, family, separate):
    model, batch = model_of(family, implementation_of(version)), packed(separate)
    model.eval()
    with torch.no_grad():
        plain = model(**batch).logits
        with instrument(model, strict=True) as handle:
            assert torch.equal(model(**batch).logits, plain)
    library = VERSIONS[version]
    assert set(handle.coverage.measured.values()) == {f"probe ({library}.flash_attn_varlen_func)"}
    check(handle, alone(family))
    rows = next(iter(handle.latest.values()))
    lengths = torch.cat([torch.arange(len(text)) + 1 for text in TEXTS])
    lengths = lengths if family == "llama" else lengths.clamp(max=5)
    assert torch.equal(rows.visible_keys.expand(1, 4, len(lengths))[0, 0], lengths)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", pytest.param("right", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("version, family", EACH)
def test_a_padded_batch(version, family, side):
    longest = max(map(len, TEXTS))
    pad = [[0] * (longest - len(text)) for text in TEXTS]
    tokens = torch.tensor([p + t if side == "left" else t + p for p, t in zip(pad, TEXTS)])
    mask = torch.tensor(
        [
            [0] * len(p) + [1] * len(t) if side == "left" else [1] * len(t) + [0] * len(p)
            for p, t in zip(pad, TEXTS)
        ]
    )
    model = model_of(family, implementation_of(version)).eval()
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), instrument(model, strict=True) as handle:
        model(tokens, attention_mask=mask, position_ids=places)
    check(handle, alone(family))  # transformers unpads: the tokens of all texts lie end to end


@pytest.mark.slow
def test_equal_lengths_and_a_cache():
    model, reference = model_of("llama", "flash_attention_2").eval(), model_of("llama").eval()
    tokens = torch.randint(3, 40, (2, 9))
    with torch.no_grad(), instrument(model, strict=True) as ours, instrument(reference) as theirs:
        for one in (model, reference):
            cache = transformers.DynamicCache(config=one.config)
            one(tokens[:, :6], cache=cache)
            one(tokens[:, 6:8], cache=cache)  # M = 2, N = 8: bottom right
        for mine, eager in zip(ours.latest.values(), theirs.latest.values(), strict=True):
            for name in ROWS:
                torch.testing.assert_close(
                    getattr(mine.rows, name), getattr(eager.rows, name), rtol=1e-4, atol=1e-4
                )
            assert mine.rows.lse.shape == (2, 4, 2) and mine.visible_keys.max() == 8
        assert torch.equal(
            model.generate(tokens, max_new_tokens=3), reference.generate(tokens, max_new_tokens=3)
        )


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["probe", "fused"])
def test_a_packed_fine_tune_is_monitored(mode):
    """TRL-style: packed rows with position_ids and labels, every step measured and judged."""
    losses = []
    for watched in (False, True):
        model, batch = model_of("llama", "flash_attention_2"), packed(separate=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        monitor = AttentionStabilityMonitor(model, log_every=2, mode=mode) if watched else None
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            diagnosis = monitor.on_step() if watched else None
            if watched and diagnosis is not None:
                assert not diagnosis.not_measured and len(diagnosis.stats) == 2
                for stats in diagnosis.stats.values():
                    assert (stats.rows == sum(map(len, TEXTS))).all()
        if watched:
            monitor.restore()
    assert losses[:4] == losses[4:] if mode == "probe" else losses[:4] == pytest.approx(losses[4:], rel=1e-4)


@pytest.mark.slow
def test_a_hub_kernel(monkeypatch):
    kernel = flash_standins.module_of("flash_attn")
    for name, function in vars(kernel).items():
        if name.startswith("flash"):
            function.__module__ = "flash_attn2_1a2b3c"  # the hub's modules are named by their hash
    functions = [getattr(kernel, f"flash_attn_{name}") for name in ("func", "varlen_func", "with_kvcache")]
    padding = flash_utils._pad_input, flash_utils._unpad_input
    monkeypatch.setattr(flash_utils, "_lazy_imports", lambda *_, **__: (*functions, *padding))
    interface = transformers.AttentionInterface._global_mapping
    monkeypatch.setitem(interface, HUB, interface["flash_attention_2"])
    masks = transformers.AttentionMaskInterface._global_mapping
    monkeypatch.setitem(masks, HUB, masks["flash_attention_2"])
    model, batch = model_of("llama", HUB).eval(), packed(True)
    with torch.no_grad():
        plain = model(**batch).logits
        with instrument(model, strict=True) as handle:
            assert torch.equal(model(**batch).logits, plain)
    assert set(handle.coverage.measured.values()) == {"probe (flash_attn2_1a2b3c.flash_attn_varlen_func)"}
    check(handle, alone("llama"))
    assert flash_utils._flash_varlen_fn is functions[1]


@pytest.mark.slow
def test_pages_of_a_cache():
    flash_utils.lazy_import_flash_attention("flash_attention_2")
    q, new, pages = torch.randn(2, 4, 8), torch.randn(2, 2, 8), torch.randn(4, 8, 2, 8)
    table, starts = (
        torch.tensor([[2, 0], [3, 1]], dtype=torch.int32),
        torch.tensor([0, 6, 18], dtype=torch.int32),
    )

    class Paged(torch.nn.Module):
        def forward(self, caches):
            options = dict(cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=1, max_length_k=12)
            options |= dict(block_table=table, k_cache=caches[0], v_cache=caches[1])
            implementation = {"attn_implementation": "flash_attention_2"}
            return flash_utils._flash_attention_forward(
                q[None], new[None], new[None], None, 2, True, **options, **implementation
            )

    caches, paged = (pages.clone(), pages.clone()), Paged()
    with instrument(paged, strict=True) as handle:
        out = paged(caches)
    assert torch.equal(out, paged((pages.clone(), pages.clone())))
    measurement = handle.latest[""]
    assert handle.coverage.measured == {"": "probe (flash_attn.flash_attn_with_kvcache)"}
    for b, count in enumerate((6, 12)):
        keys = caches[0][table[b].long()].flatten(0, 1)[:count]  # with the new one
        assert torch.equal(keys[-1], new[b])
        scores, seen = flash_standins.scores_of(q[b][None], keys, 8**-0.5)
        for name, expected in flash_standins.statistics_of(scores, seen).items():
            torch.testing.assert_close(
                getattr(measurement.rows, name)[b].double(), expected, rtol=1e-5, atol=1e-5
            )


@pytest.mark.slow
def test_what_is_not_loaded_is_listed():
    model = model_of("llama").eval()
    model.config._attn_implementation = "flash_attention_9"
    attention = transformers.AttentionInterface()
    transformers.AttentionInterface.register(
        "flash_attention_9", lambda module, q, k, v, *_, **__: (q.transpose(1, 2), None)
    )
    try:
        with torch.no_grad(), instrument(model) as handle:
            model(torch.tensor([TEXTS[0]]))
    finally:
        attention._global_mapping.pop("flash_attention_9")
    reasons = set(handle.coverage.not_measured.values())
    assert (
        len(handle.coverage.not_measured) == 2
        and "no function of FlashAttention was reached" in reasons.pop()
    )


@pytest.mark.slow
def test_an_analysis():
    model, batch = model_of("mistral", "flash_attention_2").eval(), packed(True)
    analyzer = AttentionAnalyzer(model)
    with torch.no_grad():
        model(**batch)
    assert len(analyzer.diagnose().stats) == 2
    analyzer.restore()
