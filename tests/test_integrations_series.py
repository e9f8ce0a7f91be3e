"""Names and numbers that all writers share, what is imported when, and the JSONL writer."""

import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
from heads import head_stats, snapshot

import hnf_attention.integrations
from hnf_attention.diagnosis import diagnose
from hnf_attention.integrations import (
    JSONLWriter,
    MLflowWriter,
    TensorBoardWriter,
    TrackioWriter,
    WandbWriter,
    read_jsonl,
)
from hnf_attention.integrations.series import LayerKeys, heatmaps, histograms, kinds, overall, scalars

ENTROPIES = [0.5, 0.6, 0.7, 0.9]
NAMES = (
    "normalized_entropy_min",
    "normalized_entropy_mean",
    "max_abs_logit_max",
    "saturated_share_max",
    "log2_curvature_max",
)
MODEL_NAMES = (*NAMES, "error_bound_max", "required_bits_max")


def diagnosed(step=10, **layers):
    default = {"h.0.attn": dict(normalized_entropy=ENTROPIES), "h.1.attn": dict(max_logit=2e3, heads=2)}
    return diagnose([snapshot(step, **layers or default)])


def keys_of(diagnosis):
    keys = LayerKeys()
    assert keys.add(diagnosis.stats)
    return keys


# Names and numbers


def test_layers_are_numbered_in_order_and_keep_their_number():
    keys = LayerKeys()
    assert keys.add(["b", "a"]) and dict(keys) == {"b": "layer_00", "a": "layer_01"}
    assert not keys.add(["a"])
    assert keys.add(["c", "a"]) and keys.names() == {"layer_00": "b", "layer_01": "a", "layer_02": "c"}
    many = LayerKeys()
    many.add(f"h.{i}" for i in range(101))
    assert many["h.3"] == "layer_003" and many["h.100"] == "layer_100"


def test_a_handful_of_scalars_per_layer():
    diagnosis = diagnosed()
    numbers = scalars(diagnosis, keys_of(diagnosis))
    layers = {f"attn/layer_0{i}/{name}" for i in range(2) for name in NAMES}
    model = {f"attn/{name}" for name in (*MODEL_NAMES, "errors", "warnings")}
    assert set(numbers) == layers | model
    assert numbers["attn/layer_00/normalized_entropy_min"] == pytest.approx(0.5)
    assert numbers["attn/layer_00/normalized_entropy_mean"] == pytest.approx(0.675)
    assert numbers["attn/layer_01/max_abs_logit_max"] == numbers["attn/max_abs_logit_max"] == 2e3
    assert numbers["attn/normalized_entropy_mean"] == pytest.approx((sum(ENTROPIES) + 2 * 0.7) / 6)
    assert numbers["attn/errors"] == len(diagnosis.errors) == 0
    assert numbers["attn/warnings"] == len(diagnosis.warnings) == 2
    assert all(type(value) is float for value in numbers.values())
    assert overall(diagnosis) == {name: numbers[name] for name in model}


def test_what_no_head_could_give_is_left_out():
    empty = head_stats(judged_rows=0.0)
    diagnosis = diagnose([snapshot(1, short=empty)])
    keys = keys_of(diagnosis)
    assert not any("normalized_entropy" in name or "saturated" in name for name in scalars(diagnosis, keys))
    assert set(histograms(diagnosis, keys)) == {"attn/layer_00/max_abs_logit"}


def test_histograms_hold_the_heads():
    diagnosis = diagnosed()
    found = histograms(diagnosis, keys_of(diagnosis))
    assert set(found) == {
        f"attn/layer_0{i}/{name}" for i in (0, 1) for name in ("normalized_entropy", "max_abs_logit")
    }
    np.testing.assert_allclose(found["attn/layer_00/normalized_entropy"], ENTROPIES)


def test_heatmaps_show_each_head_and_what_is_missing():
    diagnosis = diagnosed()
    keys = keys_of(diagnosis)
    keys.add(["h.2.attn"])  # ran before, and not since
    pictures = heatmaps(diagnosis, keys)
    assert set(pictures) == {
        f"attn/{name}_heatmap" for name in ("normalized_entropy", "sink_mass", "max_abs_logit")
    }
    for picture in pictures.values():
        assert picture.shape == (3 * 16, 4 * 16, 3) and picture.dtype == np.uint8
        grey = (picture[::16, ::16] == 0xBB).all(2)
        assert grey.tolist() == [[False] * 4, [False, False, True, True], [True] * 4]
    bright = pictures["attn/normalized_entropy_heatmap"][0, ::16].astype(int).sum(1)
    assert (np.diff(bright) > 0).all()


def test_a_heatmap_of_a_large_model_stays_small():
    diagnosis = diagnose([snapshot(1, **{f"h.{i}": head_stats(heads=96) for i in range(126)})])
    picture = heatmaps(diagnosis, keys_of(diagnosis))["attn/sink_mass_heatmap"]
    assert picture.shape == (126 * 8, 96 * 8, 3)
    assert len(scalars(diagnosis, keys_of(diagnosis))) < 700


def test_kinds_change_with_what_is_found_only():
    assert kinds(diagnosed()) == kinds(diagnosed(20)) != kinds(diagnosed(h=dict()))


# Imports


@pytest.mark.slow
def test_nothing_optional_is_imported_before_it_is_used():
    code = (
        "import sys, hnf_attention, hnf_attention.integrations as i; dir(i); i.JSONLWriter('x');"
        "from hnf_attention.integrations import tensorboard, wandb, mlflow, trackio, alerts, series, training;"
        "optional = ('tensorboard', 'wandb', 'mlflow', 'trackio', 'transformers', 'lightning', 'accelerate');"
        "optional += ('pytorch_lightning',);"
        "print([m for m in (*optional, 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


def test_the_names_of_the_package():
    assert set(hnf_attention.integrations.__all__) <= set(dir(hnf_attention.integrations))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        hnf_attention.integrations.Nothing  # noqa: B018


@pytest.mark.parametrize(
    "missing, use, extra",
    [
        (["wandb"], lambda: WandbWriter(), "wandb"),
        (["mlflow"], lambda: MLflowWriter(), "mlflow"),
        (["trackio"], lambda: TrackioWriter(), "trackio"),
        (["tensorboard", "torch.utils.tensorboard"], lambda: TensorBoardWriter("runs"), "tensorboard"),
        (["transformers"], lambda: fresh("huggingface"), "trainer"),
        (["lightning", "lightning.pytorch", "pytorch_lightning"], lambda: fresh("lightning"), "lightning"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(missing, use, extra, monkeypatch):
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("huggingface", "lightning"):
        monkeypatch.delitem(sys.modules, f"hnf_attention.integrations.{name}", raising=False)
    with pytest.raises(ImportError, match=rf"expected .*pip install 'hnf-attention\[{extra}\]'"):
        use()


def fresh(module):
    return importlib.import_module(f"hnf_attention.integrations.{module}")


# JSONL


def test_lines_hold_every_head_and_are_read_back(tmp_path):
    path = tmp_path / "new folder" / "attention.jsonl"
    writer = JSONLWriter(path)
    written = [diagnosed(10), diagnosed(20)]
    for count, diagnosis in enumerate(written):
        writer.write(diagnosis)
        assert len(path.read_text().splitlines()) == count + 2  # there at once, under one line for the run
    log = read_jsonl(path)
    assert log.layers == {"layer_00": "h.0.attn", "layer_01": "h.1.attn"}
    for line, diagnosis in zip(log.snapshots, written):
        expected = diagnosis.to_dict()
        assert set(line) == {"kind", "time", *expected} and line["step"] == diagnosis.step
        assert [issue["evidence"] for issue in line["issues"]] == [i.evidence for i in diagnosis.issues]
        for name, layer in expected["layers"].items():
            assert set(line["layers"][name]) == set(layer)
            for field in ("normalized_entropy", "rows", "log2_curvature", "max_logit"):
                assert line["layers"][name][field] == pytest.approx(layer[field], rel=1e-5)


def test_what_is_not_finite_is_null(tmp_path):
    writer = JSONLWriter(tmp_path / "a.jsonl")
    writer.write(diagnose([snapshot(1, short=head_stats(judged_rows=0.0))]))
    text = (tmp_path / "a.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text.splitlines()[1])["layers"]["short"]["normalized_entropy"] == [None] * 4


def test_counts_keep_all_their_digits(tmp_path):
    writer = JSONLWriter(tmp_path / "a.jsonl")
    writer.write(diagnosed(h=dict(rows=123456789.0, max_logit=1 / 3)))
    layer = read_jsonl(tmp_path / "a.jsonl").snapshots[0]["layers"]["h"]
    assert layer["rows"] == [123456789] * 4 and layer["max_logit"] == [0.333333] * 4


def test_a_resumed_run_appends_after_a_line_that_was_cut(tmp_path):
    path = tmp_path / "a.jsonl"
    first = JSONLWriter(path)
    for step in (10, 20, 30):
        first.write(diagnosed(step))
    with path.open("a") as file:
        file.write('{"kind": "snapshot", "step": 40, "la')
    again = JSONLWriter(path)  # from a checkpoint of step 15
    for step in (20, 40):
        again.write(diagnosed(step, other=dict()))
    log = read_jsonl(path)
    assert [line["step"] for line in log.snapshots] == [10, 20, 40]
    assert [list(line["layers"]) for line in log.snapshots] == [
        ["h.0.attn", "h.1.attn"],
        ["other"],
        ["other"],
    ]
    assert log.layers == {"layer_00": "other"}


def test_a_layer_that_comes_later_is_added_to_the_map(tmp_path):
    writer = JSONLWriter(tmp_path / "a.jsonl")
    writer.write(diagnosed(1, a=dict()))
    writer.write(diagnosed(2, a=dict(), b=dict()))
    assert read_jsonl(tmp_path / "a.jsonl").layers == {"layer_00": "a", "layer_01": "b"}


# Two lines as version 0.1 wrote them; evidence and sources are shortened.
FORMER_LINES = """\
{"kind": "run", "format": 1, "versions": {"hnf-attention": "0.1.0"}, "layers": {"layer_00": "h.0.attn"}}
{"kind": "reading", "time": 1.5, "step": 10, "healthy": true, "issues": [{"layer": "h.0.attn", "head": 0,\
 "issue_type": "attention_spike", "severity": "warning", "value": 0.97, "threshold": 0.95, "source": "s",\
 "evidence": "e", "suggestion": "f"}, {"layer": "h.0.attn", "head": 0, "issue_type": "vanishing_gradient",\
 "severity": "warning", "value": 0.04, "threshold": 0.05, "source": "s", "evidence": "e", "suggestion": "f"}],\
 "layers": {"h.0.attn": {"num_heads": 2, "head_dim": 64, "dtype": "float32", "sample_period": 1,\
 "rows": [1000.0, 1000.0], "judged_rows": [1000.0, 1000.0], "nonfinite_rows": [0.0, 0.0], "entropy": [3.0, 3.0],\
 "entropy_ratio": [0.02, 0.7], "entropy_ratio_min": [0.01, 0.6], "entropy_ratio_p10": [0.015, 0.65],\
 "dead_share": [0.25, 0.0], "max_weight": [0.97, 0.2], "sink_mass": [0.05, 0.05],\
 "jacobian_trace_bound": [0.9, 0.9], "entropy_ratio_stderr": [0.0, 0.1], "dead_share_stderr": [0.0, 0.2],\
 "max_weight_stderr": [0.0, 0.0], "sink_mass_stderr": [0.0, 0.0], "jacobian_trace_bound_stderr": [0.0, 0.0],\
 "logit_range": [6.0, 6.0], "logit_range_max": [10.0, 10.0], "max_logit": [5.0, 5.0], "min_logit": [-5.0, -5.0],\
 "query_norm": [10.0, 10.0], "key_norm": [10.0, 10.0], "log2_curvature": [15.0708, 15.0708],\
 "score_magnitude": [5.00015, 5.00015], "error_bound": [5.42006e-05, 9.22123e-05], "required_bits": [7.0, 9.0],\
 "typical_bits": [1.0, 3.0]}}, "not_measured": {}}
"""


def test_files_of_version_0_1_are_read_under_todays_names(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(FORMER_LINES)
    JSONLWriter(path).write(diagnosed(20, **{"h.0.attn": dict(heads=2)}))  # a run that was resumed
    former, today = read_jsonl(path).snapshots
    assert (former["kind"], former["step"], former["time"]) == ("snapshot", 10, 1.5)
    assert [issue["issue_type"] for issue in former["issues"]] == ["one_hot_attention", "vanishing_gradient"]
    layer = former["layers"]["h.0.attn"]
    # Head statistics that came later are missing in files of before.
    assert set(former) == set(today) - {"holds", "not_judged"} and set(layer) <= set(
        today["layers"]["h.0.attn"]
    )
    assert layer["normalized_entropy"] == [0.02, 0.7] and layer["saturated_share"] == [0.25, 0.0]
    assert layer["normalized_entropy_min"] == [0.01, 0.6] and layer["normalized_entropy_p10"] == [0.015, 0.65]
    assert layer["normalized_entropy_stderr"] == [0.0, 0.1] and layer["saturated_share_stderr"] == [0.0, 0.2]


def test_the_former_name_of_the_snapshots_still_works(tmp_path):
    path = tmp_path / "a.jsonl"
    writer = JSONLWriter(path)
    for step in range(1, 101):
        writer.write(diagnosed(step))
    log = read_jsonl(path)
    with pytest.warns(DeprecationWarning, match="readings is now snapshots"):
        assert log.readings is log.snapshots
    assert repr(log) == "JSONLLog of 2 layers: 100 snapshots of steps 1 to 100"
    assert repr(type(log)({}, [])) == "JSONLLog of 0 layers: 0 snapshots"
