"""The check before training takes the learning rate: what it says of harm, and the largest clean rate."""

import json
import math

import pytest

from hnf_attention import check_attention_stability
from hnf_attention.cli.main import main
from hnf_attention.precheck.rates import CLEAN_ODDS, WIDEST

SMALL = {"d_model": 128, "n_heads": 4, "seq_len": 128}


def check(config=SMALL, **given):
    return check_attention_stability(config=config, **given)


@pytest.mark.parametrize("warmup", [0, 20, 400])
@pytest.mark.parametrize(
    "config", [SMALL, SMALL | {"temperature": 0.125, "rope": True}, SMALL | {"init_std": 0.05}]
)
def test_the_largest_clean_rate_is_where_harm_becomes_likely(config, warmup):
    rate = check(config, warmup=warmup)["largest_clean_rate"]
    assert check(config, learning_rate=rate, warmup=warmup)["harm_probability"] == pytest.approx(CLEAN_ODDS)
    above = check(config, learning_rate=8 * rate, warmup=warmup)
    assert above["harm_probability"] > 0.9 and above["verdict"] == "unstable"
    assert f"train at {rate:.2g} or less" in above["recommendations"][-1]
    assert f"expected to stay clean: {rate:.2g}" in above.summary()


def test_what_lets_scores_grow_lowers_the_clean_rate():
    usual = check()["largest_clean_rate"]
    for config in ({"d_model": 256}, {"temperature": 0.25}, {"init_std": 0.08}, {"rope": True}):
        assert check(SMALL | config)["largest_clean_rate"] < 0.9 * usual, config
    assert check(warmup=400)["largest_clean_rate"] > 1.2 * usual
    # A width of 768 and nanoGPT's warmup of 700 steps: its rate of 6e-4 is known to be clean.
    gpt2 = {"d_model": 768, "n_heads": 12, "seq_len": 1024}
    assert check(gpt2, learning_rate=6e-4, warmup=700)["verdict"] == "stable"


def test_qk_norm_sets_no_limit():
    report = check(SMALL | {"qk_norm": True}, learning_rate=1.0)
    assert report["largest_clean_rate"] is None and report["harm_probability"] == 0.0
    assert report["verdict"] == "stable"


def test_without_a_rate_nothing_is_said_of_harm():
    report = check()
    assert (
        report["harm_probability"] is None and report["verdict"] == "stable" and not report["recommendations"]
    )
    assert 1e-3 < report["largest_clean_rate"] < 1e-2


def test_wide_models_are_told_apart():
    wide = {"d_model": 2 * WIDEST, "n_heads": 24, "seq_len": 128}
    report = check(wide, learning_rate=1.0)
    assert report["verdict"] == "stable" and report["harm_probability"] > 0.9
    assert any("leaves the learning rate out" in note for note in report["notes"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"learning_rate": 0.0}, "learning_rate to be a finite number above 0, got 0.0"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"learning_rate": "1e-3"}, "got '1e-3'"),
        ({"warmup": -1}, "warmup to be an int >= 0, got -1"),
        ({"warmup": 1.5}, "warmup to be an int >= 0, got 1.5"),
        ({"optimizer": "sgd"}, r"optimizer in \('adam', 'adamw'\)"),
    ],
)
def test_wrong_plans(given, words):
    with pytest.raises(ValueError, match=words):
        check(**given)


def test_the_command_takes_the_rate(tmp_path, capsys):
    path = tmp_path / "design.json"
    path.write_text(json.dumps(SMALL))
    assert main(["check", str(path), "--learning-rate", "1e-2", "--warmup", "20", "--json", "-"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] == "unstable" and report["harm_probability"] > 0.8
    assert main(["check", str(path), "--warmup", "20"]) == 0
    assert main(["check", str(path), "--learning-rate", "-1"]) == 2
