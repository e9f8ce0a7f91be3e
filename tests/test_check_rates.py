"""The check before training takes the learning rate: what it says of harm, and the largest clean rate."""

import json
import math
import re

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
    (said,) = (text for text in above["recommendations"] if "train at" in text)
    advised = float(re.search(r"train at (\S+) or less", said)[1])
    # What is advised is clean as printed.
    assert 0.99 * rate < advised <= rate
    assert check(config, learning_rate=advised, warmup=warmup)["harm_probability"] <= CLEAN_ODDS
    assert f"expected to stay clean up to {advised:g}" in above.summary()


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


WIDE = {"d_model": 768, "n_heads": 12, "seq_len": 1024, "n_layers": 12}


@pytest.mark.parametrize("config", [WIDE, WIDE | {"d_model": 192}, SMALL | {"n_heads": 64, "init_std": 0.1}])
@pytest.mark.parametrize("rate", [1e-3, 3e-3])
def test_advised_changes_have_the_verdict_that_a_check_at_the_same_rate_gives(config, rate):
    plan = {"learning_rate": rate, "warmup": 50}
    report, checked = check(config, **plan), 0
    for near in report["neighbours"]:
        numbers = [float(number) for number in re.findall(r"[\d.]+", near["change"])]
        words = near["change"].split()
        fields = {
            "length": ("seq_len", int),
            "d_model": ("d_model", int),
            "temperature": ("temperature", float),
        }
        if " and " in near["change"].replace("query and key", ""):
            continue
        if words[0] in fields:
            field, kind = fields[words[0]]
            changed = {field: kind(numbers[1 if field == "temperature" else 0])}
        elif words[0] == "QK-norm":
            changed = {"qk_norm": True}
        elif words[1].startswith("head"):
            changed = {"n_heads": int(words[0])}
        else:
            continue
        again = check(config | changed, **plan)
        assert again["verdict"] == near["verdict"], near
        assert again["harm_probability"] == near["harm_probability"], near
        checked += 1
    assert checked >= 2


def test_a_width_beyond_what_is_known_is_no_cure_for_a_rate():
    report = check(WIDE, learning_rate=3e-3)
    assert report["verdict"] == "unstable" and report["neighbours"]
    assert not any("d_model 1536" in near["change"] for near in report["neighbours"])


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            "--learning-rate 6e-4 --warmup 700",
            "at a learning rate of 0.0006 with 700 steps of warmup: harm 2%, expected to stay clean up to 0.000816",
        ),
        ("", "largest learning rate expected to stay clean: 0.000519, after 100 steps of warmup"),
        ("--warmup 700", "largest learning rate expected to stay clean: 0.000816, after 700 steps of warmup"),
    ],
)
def test_a_check_prints_one_line_about_the_rate(options, line, tmp_path, capsys):
    path = tmp_path / "wide.json"
    path.write_text(json.dumps(WIDE))
    assert main(["check", str(path), *options.split()]) == 0
    assert capsys.readouterr().out.splitlines().count(line) == 1


def test_a_check_says_that_qk_norm_sets_no_limit_and_what_is_not_known():
    normalised = SMALL | {"qk_norm": True}
    assert "attention sets no limit to the learning rate (QK-norm)" in check(normalised).summary()
    said = check(normalised, learning_rate=0.1).summary()
    assert (
        "at a learning rate of 0.1 with 100 steps of warmup: harm 0%, attention sets no limit (QK-norm)"
        in said
    )
    unknown = check(learning_rate=0.1)
    unknown |= {"verdict": "not known", "harm_probability": None, "largest_clean_rate": None}
    assert unknown.about_rate() == "at a learning rate of 0.1 with 100 steps of warmup: harm not known"


def test_the_verdict_names_the_rate_where_it_is_the_reason(tmp_path, capsys):
    paths = [tmp_path / "small.json", tmp_path / "wide.json", tmp_path / "wild.json"]
    for path, config in zip(paths, (SMALL, WIDE, WIDE | {"init_std": 0.2})):
        path.write_text(json.dumps(config))
    assert main(["check", *map(str, paths), "--learning-rate", "3e-3"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "harm 92% at a learning rate of 0.003, expected to stay clean up to 0.000519; sigma" in printed
    assert "stable: small.json, sigma / sigma_c" in printed
    # The rate is a reason beside the spread of scores, too.
    assert "unstable: wild.json, harm 99% at a learning rate" in printed and "harm at" in printed
    assert main(["check", str(paths[1]), "--learning-rate", "3e-3"]) == 1
    assert "unstable: harm 92% at a learning rate of 0.003" in capsys.readouterr().out
