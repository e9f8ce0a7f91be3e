"""Numbers of a report's page: as bytes they come back to a step of their scale; long ones are thinned."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from report_parts import numbers, unpacked

from hnf_attention.report.page import limits, packing, scalars
from hnf_attention.run_log import metrics


@given(
    st.lists(st.floats(-1e4, 1e6, width=32) | st.just(float("nan")), min_size=6, max_size=24),
    st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_numbers_come_back_to_a_step_of_their_scale(values, heads):
    table = np.array(values[: len(values) // heads * heads], np.float32).reshape(-1, heads)
    scale = packing.Scale.of(table)
    codes = unpacked(packing.pack(scale.codes(table)), len(table))
    found = numbers(codes, scale)
    assert (np.isnan(found) == np.isnan(table)).all()
    finite = np.isfinite(table)
    if scale.log:
        held = finite & (table >= scale.low)
        step = np.log(scale.high / scale.low) / packing.LAST
        assert (np.abs(np.log(found[held] / table[held])) <= 0.51 * step).all()
        assert (codes[finite & (table < scale.low)] == 0).all()
    else:
        step = (scale.high - scale.low) / packing.LAST
        assert (np.abs(found[finite] - table[finite]) <= 0.51 * step + 1e-6 * np.abs(table[finite])).all()


def test_infinities_have_codes_of_their_own():
    table = np.array([[1.0, np.inf], [-np.inf, np.nan]], np.float32)
    codes = packing.Scale.of(table).codes(table).ravel().tolist()
    assert codes[1:] == [packing.INFINITE, packing.MINUS_INFINITE, packing.NO_NUMBER] and codes[0] == 0


def test_a_scale_is_logarithmic_where_its_numbers_need_it():
    assert packing.Scale.of(np.array([1.0, 1e4])).log
    assert not packing.Scale.of(np.array([100.0, 200.0])).log
    assert not packing.Scale.of(np.array([-1.0, 1e4])).log
    assert not packing.Scale.of(np.array([1e-6, 1.0])).log  # a share
    assert packing.Scale.of(np.array([0.0, 1.0, 1e4])).low == 1.0


def test_steady_codes_move_by_more_than_one():
    codes = np.array([[10], [11], [10], [12], [13], [255], [254]], np.uint8)
    assert packing.steady(codes).ravel().tolist() == [10, 10, 10, 12, 12, 255, 254]
    noise = np.random.default_rng(0).integers(100, 110, (200, 3)).astype(np.uint8)
    assert np.abs(packing.steady(noise).astype(int) - noise).max() <= 1


def test_thinned_scalars_keep_their_ends():
    values = np.ones(50_000)
    values[-1] = 1.5  # neither the lowest nor the highest of its stretch
    values[-9:-1] = np.arange(8.0)
    found = scalars.for_page({"loss": (np.arange(50_000), values)})["loss"]
    assert (found["steps"][0], found["steps"][-1], found["values"][-1]) == (0, 49_999, 1.5)
    assert len(found["steps"]) <= 2000


def test_the_bad_end_of_a_statistic_is_the_same_everywhere():
    assert {x.name for x in metrics.METRICS if limits.worse(x.name) == "low"} == {
        x.name for x in metrics.METRICS if x.low_is_bad
    }
    assert limits.worse("min_logit") == "low"
