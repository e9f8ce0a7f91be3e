"""What the files of an offline run of Weights & Biases hold after a `WandbWriter` wrote."""

import json
import struct

import numpy as np
import pytest
from attention_models import Model, x
from heads import diagnoses
from PIL import Image

from hnf_attention import AttentionStabilityMonitor
from hnf_attention.integrations import WandbWriter
from hnf_attention.integrations.series import LayerKeys, heatmaps, histograms, scalars

wandb = pytest.importorskip("wandb")


@pytest.fixture
def options(tmp_path, monkeypatch):
    """Of `wandb.init`: an offline run whose files, and wandb's own, are all below tmp_path."""
    for name in ("CACHE", "DATA", "CONFIG", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name.lower()))
    settings = wandb.Settings(console="off", silent=True, x_disable_stats=True, x_disable_meta=True)
    yield {"project": "tests", "mode": "offline", "dir": str(tmp_path), "settings": settings}
    wandb.teardown()


def records(folder):
    """The records of the only run below this folder: a log in blocks of 32 KiB (LevelDB's) of protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # `finish` returns before the last record is in the file
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for another piece's head in this block
            at += 32768 - at % 32768
            continue
        _, size, piece = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if piece in (1, 4):  # a whole record, or the last piece of one
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def history(folder):
    """The rows logged: nested keys joined by a blank."""
    return [
        {" ".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records(folder)
        if record.WhichOneof("record_type") == "history"
    ]


@pytest.mark.slow
def test_the_offline_files_hold_what_was_written(tmp_path, options):
    writer = WandbWriter(**options)
    written = diagnoses()
    for diagnosis in written:
        writer.write(diagnosis)
    assert writer.flush() and wandb.run is not None
    writer.close()
    assert wandb.run is None

    keys = LayerKeys()
    keys.add(written[0].stats)
    rows = history(tmp_path)
    assert [row["attn/step"] for row in rows] == [10, 20, 30]
    for row, diagnosis in zip(rows, written):
        for name, value in scalars(diagnosis, keys).items():
            assert row[name] == pytest.approx(value)
        for name, values in histograms(diagnosis, keys).items():
            assert row[f"{name} _type"] == "histogram" and sum(row[f"{name} values"]) == len(values)
            assert row[f"{name} bins"][0] <= values.min() and values.max() <= row[f"{name} bins"][-1]
        for name, pixels in heatmaps(diagnosis, keys).items():
            (path,) = tmp_path.glob(f"wandb/offline-run-*/files/{row[f'{name} path']}")
            np.testing.assert_array_equal(np.asarray(Image.open(path)), pixels)

    tables = [row.get("attn/issues nrows") for row in rows]
    assert tables == [len(written[0].issues), None, 0]  # where the issues changed
    (path,) = tmp_path.glob(f"wandb/offline-run-*/files/{rows[0]['attn/issues path']}")
    table = json.loads(path.read_text())
    first = dict(zip(table["columns"], table["data"][0]))
    assert first["issue"] == "overflow_risk" and first["layer"] == "h.1.attn" and first["value"] == 2000.0
    assert first["evidence"] == written[0].issues[0].evidence

    found = list(records(tmp_path))
    metrics = [record.metric for record in found if record.WhichOneof("record_type") == "metric"]
    assert [(m.name, m.glob_name, m.step_metric) for m in metrics] == [
        ("attn/step", "", ""),
        ("", "attn/*", "attn/step"),
    ]
    configs = [u for r in found if r.WhichOneof("record_type") == "config" for u in r.config.update]
    (layers,) = [json.loads(u.value_json) for u in configs if u.key == "attn_layers"]
    assert layers == {"layer_00": "h.0.attn", "layer_01": "h.1.attn"}

    (alert,) = [record.alert for record in found if record.WhichOneof("record_type") == "alert"]
    assert (alert.title, alert.level) == (f"Attention: {len(written[0].warnings)} warnings", "WARN")
    assert alert.text.startswith("step 10\nwarning: h.1.attn heads 0-3: ")


@pytest.mark.slow
def test_an_active_run_is_used_and_left_open(tmp_path, options):
    writer = WandbWriter(project="not started")
    with wandb.init(**options) as run:
        run.log({"loss": 2.0})
        writer.write(diagnoses()[0])
        writer.close()
        run.log({"loss": 1.0})
    rows = history(tmp_path)
    assert [row.get("loss") for row in rows] == [2.0, None, 1.0] and rows[1]["attn/step"] == 10


@pytest.mark.slow
def test_a_run_given_is_used(tmp_path, options):
    with wandb.init(**options) as run:
        writer = WandbWriter(run, alerts=False)
        writer.write(diagnoses()[0])
        assert writer.flush()
    assert not [record for record in records(tmp_path) if record.WhichOneof("record_type") == "alert"]
    assert [row["attn/warnings"] for row in history(tmp_path)] == [4.0]


def test_without_a_login_one_line_says_what_to_do(options, monkeypatch, caplog):
    monkeypatch.setenv("HOME", options["dir"])
    monkeypatch.setenv("NETRC", f"{options['dir']}/netrc")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    model = Model()
    writer = WandbWriter(**options | {"mode": "online"})
    with AttentionStabilityMonitor(model, log_every=1, writers=[writer]) as monitor:
        model(x())
        assert monitor.on_step() is not None
        monitor.restore()
    record, *_ = [record for record in caplog.records if "WandbWriter" in record.getMessage()]
    assert "run `wandb login`" in record.getMessage() and 'mode="offline"' in record.getMessage()
    assert not record.exc_info and "\n" not in record.getMessage()


def test_a_run_and_options_for_another_are_refused():
    with pytest.raises(TypeError, match=r"got a run and \['project'\]"):
        WandbWriter(object(), project="x")
