"""The doctor: what it prints is what is chosen, and a wrong result fails its self-test."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from setup_arguments import setup_arguments

from hnf_attention import attention
from hnf_attention.cli.doctor import calls, command, low_scores, machine, self_test, watched
from hnf_attention.cli.main import main
from hnf_attention.engine import engines
from hnf_attention.engine.card import NVIDIA, Card

ROOT = Path(__file__).resolve().parents[1]
HOPPER = Card("H", NVIDIA, (9, 0), 2**37, "3.6.0", True, True)


@pytest.fixture(scope="module")
def printed():
    """What `doctor --json -` writes, as text for people and as a document."""
    with pytest.MonkeyPatch.context() as patch:
        streams = io.StringIO(), io.StringIO()
        patch.setattr("sys.stdout", streams[0])
        patch.setattr("sys.stderr", streams[1])
        assert main(["doctor", "--json", "-"]) == 0
    return streams[1].getvalue(), json.loads(streams[0].getvalue(), parse_constant=pytest.fail)


def test_it_reports_versions_engines_and_a_passing_self_test(printed):
    text, document = printed
    assert f"torch {torch.__version__}" in text and "self-test passed" in text
    assert ("no CUDA card" in text) == (not torch.cuda.is_available())
    assert document["versions"]["torch"] == torch.__version__ and document["passed"] is True
    assert (document["card"] is None) == (not torch.cuda.is_available())
    assert len(document["self_test"]) == 12 and all(trial["passed"] for trial in document["self_test"])
    assert document["instrumentation"]["layers_measured"] == 2
    assert document["instrumentation"]["output_unchanged"] is True
    for kind in document["engines"]["kinds"]:
        assert kind["kind"] in text


def test_extras_are_those_of_setup(monkeypatch, printed):
    text, document = printed
    assert document["extras"] == machine.extras()
    assert f"numpy {document['versions']['numpy']}" in text and "huggingface" in text
    given = setup_arguments(monkeypatch)
    listed = {
        name: tuple(package.partition(">")[0] for package in packages)
        for name, packages in given["extras_require"].items()
        if name not in ("dev", "docs", "test")
    }
    assert listed == machine.EXTRAS


def test_a_missing_package_is_said():
    assert machine.extra_text({"a": "1.0", "b": None}) == "a 1.0, b not installed"


def test_every_head_dimension_and_dtype_has_one_path():
    taken = [pair for pairs in calls.by_head_dim().values() for pair in pairs]
    assert len(taken) == len(set(taken)) == len(calls.HEAD_DIMS) * len(calls.DTYPES)
    if not torch.cuda.is_available():
        assert list(calls.by_head_dim()) == [f"{engines.REFERENCE} / {engines.REFERENCE}"]


def test_kinds_of_calls_take_what_the_engines_choose_and_say_why(monkeypatch):
    monkeypatch.setattr(engines, "card_of", lambda device: HOPPER)
    found = {kind.kind: kind for kind in calls.kinds()}
    assert found["causal"].forward == engines.HOPPER and engines.HOPPER not in found["causal"].reasons
    for kind in ("sliding window", "boolean mask", "sinks", "packed sequences"):
        assert found[kind].forward == engines.HOPPER
    for kind, reason in (("bias (additive mask)", "additive mask"), ("soft-cap", "soft-cap")):
        assert found[kind].forward == engines.TRITON
        assert found[kind].reasons[engines.HOPPER] == f"takes no {reason}"
    assert found["one query (decoding)"].reasons[engines.HOPPER] == engines.FEW_QUERIES
    assert "extended" in found["extended statistics"].reasons[engines.HOPPER]
    assert found["statistics alone (probe)"].backward == engines.TRITON


@pytest.mark.parametrize("width", [60, 80, 140])
def test_tables_fit_the_console(width):
    stream = io.StringIO()
    console = Console(file=stream, width=width)
    command._print_machine(console)
    command._print_engines(console)
    assert max(map(cell_len, stream.getvalue().splitlines())) <= width and "…" not in stream.getvalue()


@pytest.mark.parametrize("broken", ["out", "statistics", "gradients"])
def test_a_wrong_number_fails(broken):
    good = next(self_test.self_test())
    assert good.passed
    for number in (1.0, float("nan")):
        bad = replace(good, **{broken: number})
        assert not bad.passed
        assert json.dumps(bad.to_dict(), allow_nan=False)


def test_a_wrong_kernel_is_noticed(monkeypatch, capsys):
    def off_by_a_little(*args, **kwargs):
        out, rows = attention(*args, **kwargs)
        return out, replace(rows, entropy=rows.entropy + 1e-3)

    monkeypatch.setattr(self_test, "attention", off_by_a_little)
    assert main(["doctor"]) == 1
    assert "12 of 12 self-tests of calls failed" in capsys.readouterr().out


def test_a_wrong_measurement_is_noticed():
    good = watched.watch()
    assert good.passed and good.layers == good.expected == 2
    for bad in (
        replace(good, layers=1),
        replace(good, unchanged=False),
        replace(good, errors=good.errors | {"entropy": 1e-3}),
        replace(good, errors=good.errors | {"max_logit": float("nan")}),
    ):
        assert not bad.passed
        assert json.dumps(bad.to_dict(), allow_nan=False)


def test_measuring_something_else_fails_the_self_test(monkeypatch, capsys):
    true = watched._expected
    monkeypatch.setattr(
        watched, "_expected", lambda layer, x: true(layer, x) | {"entropy": true(layer, x)["entropy"] + 1e-3}
    )
    assert not watched.watch().passed
    monkeypatch.setattr("hnf_attention.cli.doctor.command.self_test", lambda: iter(()))
    assert main(["doctor"]) == 1
    assert "the self-test of measuring a model failed" in capsys.readouterr().out


def nan_with_half_a_tile(query, key, value):
    """Attention with the fault of cuDNN 9.19: gradients are NaN with 64 and 192 keys."""
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    if key.shape[2] % 128 == 64:
        out.register_hook(lambda gradient: gradient * float("nan"))
    return out


def test_a_fault_of_pytorchs_own_at_low_scores_is_told_and_is_not_ours(monkeypatch, capsys):
    monkeypatch.setattr(low_scores, "_by_cudnn", nan_with_half_a_tile)
    found = low_scores.low_scores()
    assert found.wrong == {"SDPA": [], "SDPA by cuDNN": [64, 192], "attention()": []} and found.passed
    monkeypatch.setattr(command, "self_test", lambda: iter(()))
    assert main(["doctor", "--json", "-"]) == 0
    captured = capsys.readouterr()
    said = "are -122: SDPA right, SDPA by cuDNN WRONG (64 and 192 keys), attention() right"
    assert said in captured.err.replace("\n", " ")
    assert json.loads(captured.out)["low_scores"]["keys_with_wrong_gradients"]["SDPA by cuDNN"] == [64, 192]


@pytest.mark.parametrize("fault", [nan_with_half_a_tile, lambda q, k, v: attention(q, k, v)[0] * 1.1])
def test_ours_must_be_right_at_low_scores(fault, monkeypatch, capsys):
    monkeypatch.setattr(low_scores, "attention", lambda *tensors: (fault(*tensors), None))
    assert low_scores.low_scores().wrong["attention()"][0] == 64
    monkeypatch.setattr(command, "self_test", lambda: iter(()))
    assert main(["doctor"]) == 1
    assert "the self-test of low scores failed" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="cuDNN's attention may be offered here")
def test_a_kernel_that_pytorch_does_not_offer_is_left_out():
    assert low_scores.low_scores().wrong == {"SDPA": [], "attention()": []}


def test_the_random_state_of_the_process_is_left_alone():
    before = torch.get_rng_state()
    watched.watch()
    assert torch.equal(torch.get_rng_state(), before)
