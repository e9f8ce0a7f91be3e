"""`check` from a configuration alone, against random weights of the same configuration, family by family."""

import pytest
import torch
from check_families import CLASS, NOT_KNOWN, PLAIN, TOKENS, configuration, measured_spread, transformers

from hnf_attention import check_attention_stability, stability_region
from hnf_attention.precheck import known_design, read_design
from hnf_attention.precheck.random_layer import random_layers
from hnf_attention.precheck.shrink import Unknown

QUICK = ("gpt_neo", "exaone4", "deepseek_v3")  # no scale, QK-norm, latent attention


def assert_predicted(family):
    config = configuration(family)
    report = check_attention_stability(config=config, seq_len=TOKENS)
    predicted, measured = report["layers"][0]["score_std"], measured_spread(config)
    ratio = predicted / measured
    print(f"{family}: predicted {predicted:.3f}, measured {measured:.3f}, ratio {ratio:.2f}")
    assert 1 / 1.5 < ratio < 1.5, (predicted, measured)
    assert report["notes"] == [] and report["verdict"] != "not known"
    return report


@pytest.mark.parametrize("family", QUICK)
def test_what_no_field_says_is_read_from_the_class(family):
    report = assert_predicted(family)
    plain = read_design(configuration(family), seq_len=TOKENS)
    assert any("its class" in source for source in report["sources"].values())
    assert known_design(configuration(family), seq_len=TOKENS) != plain


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("family", sorted(set(PLAIN | CLASS) - set(QUICK)))
def test_the_predicted_spread_is_what_random_weights_do(family):
    report = assert_predicted(family)
    of_class = any("its class" in source for source in report["sources"].values())
    assert of_class == (family in CLASS)


@pytest.mark.slow
@pytest.mark.parametrize("family", NOT_KNOWN)
def test_a_family_that_cannot_be_predicted_has_no_verdict(family):
    report = check_attention_stability(config=configuration(family), seq_len=TOKENS)
    assert report["notes"][0].startswith("not known: ") and report["verdict"] == "not known"
    assert report["float16_safe"] is None and not report.healthy and report["neighbours"] == []
    assert {found["status"] for found in report["dtypes"].values()} == {"not known"}
    with pytest.raises(Unknown, match=report["notes"][0].removeprefix("not known: ")[:30]):
        known_design(configuration(family), seq_len=TOKENS)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "nobodys", "d_model": 64, "n_heads": 4}, "no configuration of model_type 'nobodys'"),
        (transformers.LlamaConfig(use_timm_backbone=True), "another model (use_timm_backbone)"),
        (transformers.Wav2Vec2Config(hidden_size=64, num_attention_heads=4), "takes input_values"),
    ],
)
def test_classes_that_are_not_built_are_not_known(config, reason):
    report = check_attention_stability(config=config, seq_len=64)
    assert report["verdict"] == "not known" and reason in report["notes"][0]


def test_code_that_a_configuration_names_is_not_run():
    report = check_attention_stability(
        config=transformers.LlamaConfig(
            hidden_size=64, num_attention_heads=4, auto_map={"AutoModel": "x--m.M"}
        )
    )
    assert report["verdict"] == "stable" and "auto_map" in report["notes"][0]


@pytest.mark.slow
def test_a_wide_class_is_built_narrow_and_its_advice_is_what_no_width_changes():
    """DeepSeek V2 matches plain attention by accident at one of the widths at which it would be built."""
    wide = transformers.GPT2Config(n_embd=12288, n_head=96, n_layer=96)
    assert check_attention_stability(config=wide)["layers"][0]["score_std"] == pytest.approx(0.02**2 * 12288)
    with pytest.raises(Unknown, match="too large"):
        random_layers(wide, 1)
    latent = check_attention_stability(config=configuration("deepseek_v3"), seq_len=TOKENS)
    assert set(latent["margins"]) == {"temperature", "seq_len"}
    region = stability_region(configuration("deepseek_v3"))
    assert region.dims.tolist() == [256]
    with pytest.raises(ValueError, match="expected dims .256., at which its class was measured"):
        stability_region(configuration("deepseek_v3"), dims=[512])


def test_building_a_class_leaves_the_generator_and_the_configuration_alone():
    config = configuration("gpt_neo")
    before, state = config.to_dict(), torch.get_rng_state()
    random_layers(config, 1)
    assert config.to_dict() == before and torch.equal(state, torch.get_rng_state())


def test_weights_that_depend_on_the_depth_are_those_of_the_whole_model():
    """CLIP's q and k have a standard deviation of sqrt(1 / (2 layers width))."""
    vision = dict(hidden_size=64, num_attention_heads=4, intermediate_size=64, image_size=64, patch_size=8)
    stds = [
        random_layers(transformers.CLIPVisionConfig(num_hidden_layers=n, **vision), 1).stds[0] for n in (2, 8)
    ]
    assert stds[0] / stds[1] == pytest.approx(4.0, rel=0.1)
