"""What TensorBoard's own event reader finds after a `TensorBoardWriter` wrote."""

import io

import numpy as np
import pytest
from heads import diagnoses
from PIL import Image

from hnf_attention.integrations import TensorBoardWriter
from hnf_attention.integrations.series import LayerKeys, heatmaps, histograms, scalars

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def read(folder):
    sizes = {"scalars": 0, "histograms": 0, "images": 0, "tensors": 0}  # 0: all
    events = event_accumulator.EventAccumulator(str(folder), sizes)
    events.Reload()
    return events


def texts(events, tag):
    return [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors(f"{tag}/text_summary")]


def test_the_event_reader_finds_what_was_written(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    written = diagnoses()
    for diagnosis in written:
        writer.write(diagnosis)
    assert writer.flush()
    events = read(tmp_path)  # before it is closed: each snapshot is flushed

    keys = LayerKeys()
    keys.add(written[0].stats)
    assert set(events.Tags()["scalars"]) == set(scalars(written[0], keys))
    for name in events.Tags()["scalars"]:
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(d.step, pytest.approx(scalars(d, keys)[name], rel=1e-6)) for d in written]

    assert set(events.Tags()["histograms"]) == set(histograms(written[0], keys))
    first = events.Histograms("attn/layer_00/normalized_entropy")[0].histogram_value
    assert (first.num, first.min, first.max) == (4, pytest.approx(0.5), pytest.approx(0.9))
    assert first.sum == pytest.approx(2.7)

    assert set(events.Tags()["images"]) == set(heatmaps(written[0], keys))
    for diagnosis, event in zip(written, events.Images("attn/max_abs_logit_heatmap"), strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
        np.testing.assert_array_equal(pixels, heatmaps(diagnosis, keys)["attn/max_abs_logit_heatmap"])

    ((step, text),) = texts(events, "attn/layers")
    assert step == 10 and "| layer_01 | h.1.attn |" in text
    issues = texts(events, "attn/issues")
    assert [step for step, _ in issues] == [10, 30]  # where they changed
    assert "overflow_risk in h.1.attn" in issues[0][1] and "0 errors" in issues[1][1]
    writer.close()


def test_a_closed_writer_goes_on_in_another_file(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    for diagnosis in diagnoses():
        writer.write(diagnosis)
        writer.close()
        writer.close()
    assert len(read(tmp_path).Scalars("attn/errors")) == 3


def test_a_summary_writer_stays_its_owners(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as events:
        writer = TensorBoardWriter(events)
        writer.write(diagnoses()[0])
        writer.close()
        events.add_scalar("loss", 1.0, 10)
    assert {"loss", "attn/layer_01/max_abs_logit_max"} <= set(read(tmp_path).Tags()["scalars"])
