"""`check_attention_stability`: what it reads, predicts, measures and advises."""

import io
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

transformers = pytest.importorskip("transformers")

from hnf_attention import StabilityReport, check_attention_stability  # noqa: E402
from hnf_attention.precheck.advice import Neighbour, neighbours  # noqa: E402
from hnf_attention.precheck.configuration import read_design  # noqa: E402
from hnf_attention.precheck.predict import worst_layer  # noqa: E402
from hnf_attention.precheck.rounding import rounded_down, rounded_up  # noqa: E402

PLAIN = {"d_model": 128, "n_heads": 8, "seq_len": 256}
SEED_KEYS = {
    "expected_logit_max",
    "curvature_bound",
    "precision_bits_needed",
    "float16_safe",
    "recommendations",
}
LARGE = transformers.GPT2Config(n_embd=1280, n_head=20, n_layer=36)


def tiny(seed=0, **options):
    torch.manual_seed(seed)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=100, n_positions=64, n_embd=128, n_layer=2, n_head=4, **options)
    )


def test_the_proposals_snippet_runs_as_written(tmp_path):
    LARGE.save_pretrained(tmp_path)
    model, sample_input = None, torch.randint(0, 100, (2, 1024))

    config = transformers.AutoConfig.from_pretrained(tmp_path)
    report = check_attention_stability(model, sample_input, config)
    print(report["recommendations"])

    assert set(report) >= SEED_KEYS
    assert report["float16_safe"] and report["verdict"] == "stable" and report["recommendations"] == []
    assert report["expected_logit_max"] == pytest.approx(0.512 * 3.23, rel=0.01)
    assert report["curvature_bound"] == 2 ** report["log2_curvature_bound"]
    assert len(report["layers"]) == 36


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (transformers.GPT2Config(), dict(d_model=768, n_heads=12, head_dim=64, seq_len=1024, rotary=0)),
        (
            transformers.LlamaConfig(num_key_value_heads=8),
            dict(n_kv_heads=8, head_dim=128, rotary=128, interleaved=False),
        ),
        (transformers.Gemma2Config(), dict(softcap=50.0, head_dim=256, scale=1 / 16)),
        (transformers.Qwen3Config(), dict(qk_norm=True)),
        (transformers.GPTJConfig(), dict(rotary=64, interleaved=True)),
        (transformers.GPTNeoXConfig(), dict(rotary=24)),
        (transformers.FalconConfig(), dict(n_kv_heads=1)),
        (
            PLAIN | {"rope": True, "softcap": 30.0, "qk_norm": True, "dtype": "bf16"},
            dict(rotary=16, dtype="bfloat16"),
        ),
        (PLAIN | {"temperature": 2.0}, dict(scale=0.125)),
        (SimpleNamespace(hidden_size=64, num_heads=4, seq_length=32), dict(head_dim=16, seq_len=32)),
    ],
)
def test_reads_configurations_of_many_kinds(config, expected):
    design = read_design(config)
    assert {name: getattr(design, name) for name in expected} == expected


def test_t5_and_inverse_layer_scales_and_windows():
    t5 = check_attention_stability(config=transformers.T5Config(), seq_len=512)
    assert t5["layers"][0]["score_std"] == pytest.approx(1.0)  # its own initialisation, without a scale
    gpt2 = transformers.GPT2Config(n_layer=4, scale_attn_by_inverse_layer_idx=True)
    stds = [layer["score_std"] for layer in check_attention_stability(config=gpt2)["layers"]]
    np.testing.assert_allclose(stds, stds[0] / np.arange(1, 5))
    gemma = read_design(transformers.Gemma2Config(), seq_len=8192)
    assert [gemma.keys(layer) for layer in range(3)] == [4096, 8192, 4096]


def test_sources_tell_what_was_assumed():
    sources = check_attention_stability(config=PLAIN)["sources"]
    assert sources["design.init_std"] == "assumed: 0.02" and sources["design.d_model"] == "config: d_model"
    assert check_attention_stability(config=PLAIN, seq_len=64)["sources"]["design.seq_len"] == "given"
    assert sources["sigma_ratio"] == "predicted: initialisation"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"n_heads": 8, "seq_len": 8}, "expected d_model .* none of d_model, hidden_size, n_embd"),
        ({"d_model": 8, "seq_len": 8}, "expected n_heads .* none of n_heads, num_attention_heads"),
        ({"d_model": 8, "n_heads": 2}, "expected seq_len .* none of seq_len, .*; give seq_len"),
        (PLAIN | {"n_heads": 7}, "n_heads to divide d_model, got 7 heads and d_model 128"),
        (PLAIN | {"n_heads": 0}, "n_heads to be an integer of at least 1, got 0"),
        (PLAIN | {"d_model": -128}, "d_model to be an integer of at least 1, got -128"),
        (PLAIN | {"n_heads": True}, "n_heads to be an integer"),
        (PLAIN | {"seq_len": 2.5}, "seq_len to be an integer"),
        (PLAIN | {"n_kv_heads": 3}, "n_kv_heads to divide the 8 heads, got 3"),
        (PLAIN | {"init_std": -0.1}, "init_std to be a finite number above 0, got -0.1"),
        (PLAIN | {"softcap": float("nan")}, "softcap to be a finite number"),
        (PLAIN | {"temperature": 0}, "temperature to be a finite number above 0"),
        (PLAIN | {"window": 0}, "window to be an integer"),
        (PLAIN | {"dtype": "int4"}, "expected a dtype among .* got 'int4'"),
        (None, "expected a configuration, got None"),
    ],
)
def test_bad_configurations_are_refused_in_one_line(config, message):
    with pytest.raises(ValueError, match=message) as caught:
        check_attention_stability(config=config)
    assert "\n" not in str(caught.value)


def test_a_name_that_nothing_asks_for_is_a_note():
    numbers = {"d_model": 64, "n_heads": 4, "seq_len": 128, "rope": True}
    assert check_attention_stability(None, None, numbers)["notes"] == []
    others = numbers | {"vocab_size": 5, "swa_head_dim": 32, "n_head": 8}
    notes = check_attention_stability(None, None, others)["notes"]
    assert notes == ["not used: n_head", "not used: swa_head_dim", "not used: vocab_size"]
    assert check_attention_stability(None, None, transformers.GPT2Config())["notes"] == []


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("init_sdt", "init_std"),
        ("qknorm", "qk_norm"),
        ("hiden_size", "hidden_size"),
        ("n_haeds", "n_heads"),
        ("initialiser_range", "initializer_range"),
        ("rope_tehta", "rope_theta"),
    ],
)
def test_misspelt_fields_are_refused_with_the_name_that_is_meant(wrong, meant):
    numbers = {"d_model": 64, "n_heads": 4, "seq_len": 128, wrong: 2}
    family = {"model_type": "gpt2", wrong: 2}
    for config in (numbers, family, transformers.GPT2Config(**{wrong: 2})):
        with pytest.raises(ValueError, match=f"got '{wrong}': is '{meant}' meant"):
            read_design(config)


def test_fields_of_a_family_that_look_misspelt_are_its_own():
    for config in (transformers.LayoutLMConfig(), transformers.IdeficsConfig()):  # max_2d_position_embeddings
        assert read_design(config, seq_len=64).n_heads


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"shape \(batch, length, ...\), got \(4,\)"):
        check_attention_stability(None, torch.zeros(4), PLAIN)
    with pytest.raises(ValueError, match="tolerance between 0 and 1"):
        check_attention_stability(config=PLAIN, tolerance=2.0)
    with pytest.raises(TypeError, match="torch.nn.Module or None, got str"):
        check_attention_stability("gpt2", config=PLAIN)
    with pytest.raises(ValueError, match="a model with attention, got Linear"):
        check_attention_stability(torch.nn.Linear(2, 2), config=PLAIN)


def test_predictions_at_initialisation_are_what_is_measured():
    """Fresh models are what the prediction is about."""
    model = tiny(initializer_range=0.06)
    predicted = check_attention_stability(config=model.config)
    report = check_attention_stability(model, torch.randint(0, 100, (8, 64)), model.config)
    assert report["sources"]["sigma_ratio"] == "measured"
    first = report["layers"][0]  # deeper ones see correlated tokens
    assert first["score_std"] == pytest.approx(predicted["layers"][0]["score_std"], rel=0.2)
    assert first["expected_logit_max"] == pytest.approx(predicted["expected_logit_max"], rel=0.3)
    assert first["max_abs_logit"] <= first["weight_logit_bound"]
    weights = check_attention_stability(model, config=model.config)
    assert weights["sources"]["sigma_ratio"] == "predicted: weights"
    assert weights["layers"][0]["score_std"] == pytest.approx(predicted["layers"][0]["score_std"], rel=0.1)
    assert report["weight_logit_bound"] == weights["weight_logit_bound"] > 0
    # Measured on a sample, or else on random tokens.
    assert "weight_logit_typical" not in report and not weights["notes"]
    assert weights["sources"]["weight_logit_typical"] == "measured: random tokens"
    for row in weights["layers"]:
        pairs = zip(row["weight_logit_typicals"], row["weight_logit_bounds"], strict=True)
        assert all(0 < typical <= bound for typical, bound in pairs)
    assert weights["weight_logit_typical"] == max(x["weight_logit_typical"] for x in weights["layers"])


def test_a_segment_that_all_tokens_share_leaves_less_spread_within_a_row():
    shape = dict(vocab_size=2000, hidden_size=256, num_attention_heads=4, num_hidden_layers=1)
    config = transformers.BertConfig(**shape, intermediate_size=64, max_position_embeddings=128)
    torch.manual_seed(0)
    model = transformers.BertModel(config)
    predicted = check_attention_stability(config=config)["layers"][0]
    found = check_attention_stability(model, torch.randint(2000, (1, 128)))["layers"][0]
    assert found["score_std"] == pytest.approx(predicted["score_std"], rel=0.08)
    assert found["expected_logit_max"] == pytest.approx(predicted["expected_logit_max"], rel=0.08)
    alone = check_attention_stability(config=transformers.BertConfig(**shape, type_vocab_size=0))["layers"][0]
    assert predicted["score_std"] == pytest.approx(alone["score_std"] * (2 / 3) ** 0.5)
    # Over rows the scores are as large as without.
    short = check_attention_stability(config=transformers.BertConfig(**shape, type_vocab_size=0), seq_len=128)
    assert predicted["max_abs_logit"] == pytest.approx(short["layers"][0]["max_abs_logit"])


def test_a_sample_may_be_keyword_arguments_and_leaves_the_model_as_it_was():
    model = tiny().train()
    model.transformer.drop.eval()
    ids = torch.randint(0, 100, (2, 32))
    report = check_attention_stability(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert report["sources"]["sigma_ratio"] == "measured" and report["layers"][0]["keys"] == 32
    assert model.training and not model.transformer.drop.training
    assert model.transformer.h[0].attn.training


def test_a_report_and_a_design_are_shown_in_one_line():
    report = check_attention_stability(config=LARGE)
    assert repr(report) == f"StabilityReport(stable, sigma_ratio {report['sigma_ratio']:.3g}, " + (
        f"margin {report['margin']:.3g}, 36 layers)"
    )
    assert repr(StabilityReport()) == "StabilityReport(no verdict)"
    gemma = read_design(transformers.Gemma2Config(), seq_len=8192)
    assert "head_dim=256" in repr(gemma) and len(repr(gemma)) < 300


def test_a_sample_that_cannot_run_is_a_note_and_the_weights_speak():
    report = check_attention_stability(tiny(), torch.full((1, 16), 10**6))
    assert "the model cannot run the sample" in report["notes"][0]
    assert report["sources"]["sigma_ratio"] == "predicted: weights"


def test_a_run_on_random_tokens_that_fails_is_a_note():
    model = tiny()

    def fail(*_):
        raise KeyError("pixels")

    model.transformer.h[1].register_forward_pre_hook(fail)
    report = check_attention_stability(model)
    assert report["notes"] == ["not run on random tokens: KeyError: 'pixels'"]
    assert report["weight_logit_bound"] > 0 and "weight_logit_typical" not in report


def test_a_layer_that_random_tokens_did_not_reach_has_an_empty_place(monkeypatch):
    from hnf_attention.precheck import check as module
    from hnf_attention.report.check import verdict

    monkeypatch.setattr(
        module, "random_token_maxima", lambda *_: {"transformer.h.1.attn": torch.tensor([123.25, 1.0])}
    )
    report = check_attention_stability(tiny())
    assert "weight_logit_typical" not in report["layers"][0] and report["weight_logit_typical"] == 123.25
    console = Console(width=200, file=io.StringIO())
    console.print(verdict(report, "tiny"))
    lines = console.file.getvalue().splitlines()
    assert sum("123.2" in line for line in lines) == 1


def test_a_model_without_numbers_is_a_note():
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1))
    report = check_attention_stability(model, torch.zeros(1, 8, dtype=torch.long))
    assert (
        "meta device" in report["notes"][0]
        and report["sources"]["sigma_ratio"] == "predicted: initialisation"
    )


def test_a_broken_model_is_unstable_whatever_its_design():
    model = tiny()
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight[:, :256] *= 60.0
    report = check_attention_stability(model, torch.randint(0, 100, (2, 64)))
    assert report["verdict"] == "unstable" and not report.healthy
    assert report["issues"] and report["recommendations"]


@pytest.mark.parametrize("knob", ["seq_len", "temperature", "init_std"])
def test_monotone(knob):
    values = {"seq_len": [64, 512, 4096], "temperature": [4.0, 1.0, 0.25], "init_std": [0.01, 0.05, 0.2]}[
        knob
    ]
    reports = [check_attention_stability(config=PLAIN | {knob: value}) for value in values]
    for key in ("expected_logit_max", "log2_curvature_bound", "precision_bits_needed", "max_abs_logit"):
        column = [report[key] for report in reports]
        assert column == sorted(column) and (key == "precision_bits_needed" or column[0] < column[-1]), key
    ratios = [report["sigma_ratio"] for report in reports]
    assert ratios == sorted(ratios, reverse=knob == "seq_len")  # a longer row stands a larger spread


def test_overflows_that_only_naive_code_has_are_told_apart_from_those_that_count():
    report = check_attention_stability(config=PLAIN | {"init_std": 0.4, "dtype": "bf16"})
    assert report["max_abs_logit"] > 88.8
    single = report["dtypes"]["float32"]
    assert single["status"] == "safe" and single["overflows"] == []
    assert single["elsewhere"].keys() == {"exp(score) in float32"}
    told = [
        line for line in report.summary().splitlines() if line.startswith("not counted: float32, bfloat16")
    ]
    assert (
        len(told) == 1 and "overflow, but only in a softmax written by hand that does not subtract" in told[0]
    )


def test_extreme_numbers_stay_numbers():
    report = check_attention_stability(config=PLAIN | {"temperature": 1e-30, "n_layers": 2})
    assert isinstance(report, StabilityReport) and report["curvature_bound"] == np.inf
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert document["curvature_bound"] is None and document["verdict"] == "unstable"
    single = check_attention_stability(config=PLAIN | {"seq_len": 1})
    assert single["sigma_ratio"] == 0.0 and single["verdict"] == "stable"
    json.dumps(single.to_dict(), allow_nan=False)


def test_advice_is_computed_and_its_designs_are_stable():
    config = PLAIN | {"n_heads": 64, "seq_len": 1024, "init_std": 0.1}
    report = check_attention_stability(config=config)
    assert report["verdict"] == "marginal"
    assert "head_dim 2 makes rows unequal" in report["recommendations"][0]
    found = {near["change"]: near for near in report["neighbours"]}
    assert all(near["margin"] >= 1 and near["verdict"] == "stable" for near in report["neighbours"][:3])
    # What the search says of a design is what a check of that design says.
    again = check_attention_stability(config=config | {"qk_norm": True})
    assert found["QK-norm"]["sigma_ratio"] == pytest.approx(again["sigma_ratio"])
    init = next(near for text, near in found.items() if "initialised" in text)
    std = float(init["change"].split()[-1])
    assert check_attention_stability(config=config | {"init_std": std})["verdict"] == "stable"
    heads = next(
        text for text in found if text.endswith(")") and "heads (head_dim" in text and " and " not in text
    )
    fewer = check_attention_stability(config=config | {"n_heads": int(heads.split()[0])})
    assert found[heads]["sigma_ratio"] == pytest.approx(fewer["sigma_ratio"])


@pytest.mark.parametrize(
    "config", [{"init_std": 0.3}, {"temperature": 0.07, "init_std": 0.05}, {"d_model": 2048}]
)
def test_an_offered_design_is_stable_with_its_printed_numbers_or_names_its_verdict(config):
    config = PLAIN | {"init_std": 0.08, "n_heads": 4} | config
    report = check_attention_stability(config=config)
    texts, checked = report["recommendations"][1:], 0
    for near, text in zip(report["neighbours"], texts, strict=True):
        numbers = [float(number) for number in re.findall(r"[\d.]+", near["change"])]
        fields = {"query": ("init_std", -1), "temperature": ("temperature", 1), "length": ("seq_len", 0)}
        fields |= {"d_model": ("d_model", 0), "soft-cap": ("softcap", 0)}
        field, place = fields.get(near["change"].split()[0], (None, 0))
        if field is not None and " and " not in near["change"].replace("query and key", ""):
            as_printed = {field: type(PLAIN.get(field, 1.0))(numbers[place])}
            assert check_attention_stability(config=config | as_printed)["verdict"] == near["verdict"], text
            checked += 1
        assert (near["verdict"] == "stable") == ("not enough" not in text)
    assert checked >= 3 and any("helps but is not enough: still unstable" in text for text in texts)


def test_margins_are_where_the_ratio_becomes_a_half():
    report = check_attention_stability(config=PLAIN | {"init_std": 0.03})
    for knob, field in (("temperature", "temperature"), ("init_std", "init_std")):
        at = check_attention_stability(config=PLAIN | {"init_std": 0.03} | {field: report["margins"][knob]})
        assert at["sigma_ratio"] == pytest.approx(0.5, rel=1e-6)


def test_two_changes_where_one_is_not_enough():
    design = read_design(PLAIN | {"d_model": 8192, "n_heads": 64, "seq_len": 1024, "temperature": 0.3})
    found = neighbours(design)
    assert found and all(near.sigma_ratio < worst_layer(design)[0] for near in found)
    assert any(" and " in near.change for near in found)


def test_the_printed_factor_of_the_temperature_is_enough():
    config = {"d_model": 512, "n_heads": 8, "n_layers": 1, "seq_len": 1024, "init_std": 0.07}
    for now in (1.0, 1.1, 1.3):
        report = check_attention_stability(config=config | {"temperature": now})
        text = next(
            near["change"] for near in report["neighbours"] if near["change"].startswith("temperature")
        )
        factor, temperature = (float(number) for number in re.findall(r"[\d.]+", text))
        assert now * factor == pytest.approx(temperature, rel=0.01)
        for applied in (now * factor, temperature):
            assert check_attention_stability(config=config | {"temperature": applied})["verdict"] == "stable"


def test_numbers_of_three_digits_are_not_rounded():
    assert [rounded_up(x) for x in (1.1, 0.3, 1.0, np.float64(2.2), np.inf)] == [1.1, 0.3, 1.0, 2.2, np.inf]
    assert [rounded_down(x) for x in (1.1, 0.3, 1.0, np.float64(2.2), np.inf)] == [1.1, 0.3, 1.0, 2.2, np.inf]
    assert (rounded_up(1.2301), rounded_down(1.2399), rounded_up(0.0012301)) == (1.24, 1.23, 0.00124)


@pytest.mark.parametrize(
    ("ratio", "margin", "end"),
    [
        (np.inf, 0.0, "sigma / sigma_c inf"),
        (0.3, 0.5 / 0.3, "sigma / sigma_c 0.30; the largest score is still too large"),
        (0.55, 0.5 / 0.55, "the spread of scores is 1.1 times the stable one"),
    ],
)
def test_a_change_that_is_not_enough_says_by_how_much(ratio, margin, end):
    text = str(Neighbour("length 8", ratio, margin, "unstable", 1.0))
    assert text.startswith("length 8 helps but is not enough: still unstable") and text.endswith(end)
