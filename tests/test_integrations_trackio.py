"""What trackio's own store holds after a `TrackioWriter` wrote.

Outside CI: trackio brings a server, some 60 MB.
"""

import sys

import numpy as np
import pytest
from heads import diagnoses
from PIL import Image

from hnf_attention.integrations import TrackioWriter
from hnf_attention.integrations.series import LayerKeys, heatmaps, histograms, scalars

pytestmark = [
    pytest.mark.slow,
    pytest.mark.exhaustive,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture
def trackio(tmp_path, monkeypatch):
    """trackio with its folder below tmp_path: it reads the folder's name when it is imported."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    return pytest.importorskip("trackio", reason="trackio is not in the test extra, because it is large")


def check(tmp_path, project, name, written):
    from trackio.sqlite_storage import SQLiteStorage

    keys = LayerKeys()
    keys.add(written[0].stats)
    rows = [row for row in SQLiteStorage.get_logs(project, name) if "attn/errors" in row]
    assert [row["step"] for row in rows] == [10, 20, 30]
    for row, diagnosis in zip(rows, written):
        for series, value in scalars(diagnosis, keys).items():
            assert row[series] == pytest.approx(value)
        for series, values in histograms(diagnosis, keys).items():
            assert row[series]["_type"] == "trackio.histogram" and sum(row[series]["values"]) == len(values)
        for series, pixels in heatmaps(diagnosis, keys).items():
            path = tmp_path / "trackio" / "media" / row[series]["file_path"]
            np.testing.assert_array_equal(np.asarray(Image.open(path).convert("RGB")), pixels)
    assert rows[0]["attn/layers"]["_value"] == [
        {"key": "layer_00", "layer": "h.0.attn"},
        {"key": "layer_01", "layer": "h.1.attn"},
    ]
    tables = [len(row.get("attn/issues", {}).get("_value", ())) for row in rows]
    assert tables == [len(written[0].issues), 0, 0]  # where the issues changed, and there are some
    first = rows[0]["attn/issues"]["_value"][0]
    assert first["issue"] == "overflow_risk" and first["evidence"] == written[0].issues[0].evidence
    (alert,) = SQLiteStorage.get_alerts(project, name)
    warnings = len(written[0].warnings)
    assert (alert["title"], alert["level"], alert["step"]) == (f"Attention: {warnings} warnings", "warn", 10)


def test_the_store_holds_what_was_written(trackio, tmp_path):
    writer, written = TrackioWriter(name="try 3", auto_log_cpu=False, auto_log_gpu=False), diagnoses()
    for diagnosis in written:
        writer.write(diagnosis)
    writer.close()
    check(tmp_path, "attention", "try 3", written)


def test_an_active_run_is_used_and_left_open(trackio, tmp_path):
    run = trackio.init(project="mine", name="a", auto_log_cpu=False, auto_log_gpu=False)
    trackio.log({"loss": 2.0}, step=1)
    writer = TrackioWriter()
    for diagnosis in diagnoses():
        writer.write(diagnosis)
    writer.close()
    trackio.log({"loss": 1.0}, step=31)
    trackio.finish()
    check(tmp_path, "mine", run.name, diagnoses())
    from trackio.sqlite_storage import SQLiteStorage

    assert [row["loss"] for row in SQLiteStorage.get_logs("mine", "a") if "loss" in row] == [2.0, 1.0]
