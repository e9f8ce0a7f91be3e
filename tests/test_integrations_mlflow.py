"""What MLflow's own client finds after an `MLflowWriter` wrote.

Outside CI: `pip install mlflow-skinny sqlalchemy alembic` has some 150 MB.
"""

import csv
import json

import numpy as np
import pytest
from heads import diagnoses
from PIL import Image

from hnf_attention.integrations import MLflowWriter
from hnf_attention.integrations.series import LayerKeys, heatmaps, scalars
from hnf_attention.integrations.tracker import COLUMNS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.exhaustive,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    """MLflow with a database below tmp_path."""
    pytest.importorskip("sqlalchemy", reason="MLflow's local database needs sqlalchemy")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("DO_NOT_TRACK", "true")
    monkeypatch.chdir(tmp_path)
    module = pytest.importorskip("mlflow", reason="mlflow is not in the test extra, because it is large")
    module.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    module.set_experiment("attention")
    yield module
    while module.active_run() is not None:
        module.end_run()


def check(mlflow, run, written):
    client, keys = mlflow.MlflowClient(), LayerKeys()
    keys.add(written[0].stats)
    found = client.get_run(run)
    assert {name for name in found.data.metrics if name.startswith("attn/")} == set(scalars(written[0], keys))
    for name in scalars(written[0], keys):
        values = [(metric.step, metric.value) for metric in client.get_metric_history(run, name)]
        assert sorted(values) == [(d.step, pytest.approx(scalars(d, keys)[name])) for d in written]
    images = client.download_artifacts(run, "images")
    for diagnosis in written:
        for name, pixels in heatmaps(diagnosis, keys).items():
            (path,) = (
                path
                for path in map(str, _files(images))
                if f"{name.replace('/', '~')}+step+{diagnosis.step}+" in path and path.endswith(".png")
            )
            np.testing.assert_array_equal(np.asarray(Image.open(path)), pixels)
    with open(client.download_artifacts(run, "attn/layers.json")) as file:
        assert json.load(file) == {"layer_00": "h.0.attn", "layer_01": "h.1.attn"}
    tables = {}
    for path in _files(client.download_artifacts(run, "attn/issues")):
        with path.open(newline="") as file:
            tables[path.name] = list(csv.reader(file))
    assert set(tables) == {"step_00000010.csv", "step_00000030.csv"}  # where the issues changed
    header, *rows = tables["step_00000010.csv"]
    assert header == list(COLUMNS) and len(rows) == len(written[0].issues)
    first = dict(zip(header, rows[0]))
    assert first["issue"] == "overflow_risk" and first["evidence"] == written[0].issues[0].evidence
    assert len(tables["step_00000030.csv"]) == 1
    assert found.data.tags["attn.verdict"] == "Attention: no issues"
    return found


def _files(folder):
    from pathlib import Path

    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


def test_the_store_holds_what_was_written(mlflow):
    experiment = mlflow.get_experiment_by_name("attention").experiment_id
    writer, written = MLflowWriter(run_name="try 3"), diagnoses()
    for diagnosis in written:
        writer.write(diagnosis)
    writer.close()
    assert mlflow.active_run() is None
    (run,) = mlflow.MlflowClient().search_runs([experiment])
    found = check(mlflow, run.info.run_id, written)
    assert found.info.status == "FINISHED" and found.info.run_name == "try 3"


def test_the_runs_of_others_are_used_and_left_open(mlflow):
    with mlflow.start_run() as active:
        writer = MLflowWriter()
        for diagnosis in diagnoses():
            writer.write(diagnosis)
        writer.close()
        mlflow.log_metric("loss", 1.0)
    check(mlflow, active.info.run_id, diagnoses())
    for given in (active, active.info.run_id):
        writer = MLflowWriter(given)
        writer.write(diagnoses()[0])
        writer.close()
    history = mlflow.MlflowClient().get_metric_history(active.info.run_id, "attn/errors")
    assert len(history) == 5
    with pytest.raises(TypeError, match=r"got a run and \['run_name'\]"):
        MLflowWriter(active, run_name="x")
