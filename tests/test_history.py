"""A bounded history: what is kept at which precision, and what is dropped."""

import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from heads import snapshot

from hnf_attention.monitoring import state
from hnf_attention.monitoring.history import HISTORY_BYTES, HISTORY_LENGTH, WINDOW, History
from hnf_attention.statistics.heads import Forwards, Snapshot

ONE = 40_000  # bytes of a snapshot of 64 heads, and some more


def of_heads(step, heads=64, **numbers):
    return snapshot(step, layer=dict(heads=heads) | numbers)


def steps(history):
    return [each.step for each in history]


def filled(limit, count, **numbers):
    history = History(limit)
    for step in range(1, count + 1):
        history.append(of_heads(step, **{name: value(step) for name, value in numbers.items()}))
        assert history.bytes <= limit
    return history


def test_a_short_history_is_kept_as_it_is():
    history = History()
    snapshots = [of_heads(step) for step in range(1, 101)]
    history.extend(snapshots)
    assert history.limit == HISTORY_BYTES == 64 * 2**20
    assert all(a is b for a, b in zip(history, snapshots, strict=True))
    assert history[-1] is snapshots[-1] and history[2:4] == snapshots[2:4]
    assert repr(history).startswith("History of 100 snapshots, steps 1 to 100, ")


def test_bytes_are_those_of_the_numbers():
    history = filled(100 * ONE, 10)
    numbers = sum(stats.values.nbytes for each in history for stats in each.layers.values())
    assert numbers < history.bytes < 1.2 * numbers


def test_old_numbers_go_to_float32_before_any_is_dropped():
    history = filled(12 * ONE, 16)
    assert steps(history) == list(range(1, 17))
    kinds = [each.layers["layer"].values.dtype for each in history]
    assert kinds[0] == np.float32 and kinds[-1] == np.float64
    assert kinds == sorted(kinds, key=lambda kind: kind.itemsize)
    exact, narrow = of_heads(1).layers["layer"], history[0].layers["layer"]
    for name in ("rows", "normalized_entropy", "max_abs_logit", "log2_curvature", "normalized_entropy_p10"):
        np.testing.assert_allclose(getattr(narrow, name), getattr(exact, name), rtol=1e-6)


def test_numbers_that_float32_cannot_hold_stay_wide():
    large = snapshot(1, big=dict(heads=64, query_norm=1e30), small=dict(heads=64), many=dict(rows=2.0**40))
    history = History(3 * 2 * ONE)
    history.append(large)
    for step in range(2, 6):
        history.append(snapshot(step, big=dict(heads=64), small=dict(heads=64)))
    layers = history[0].layers
    assert history[0].step == 1 and layers["big"].query_norm[0] == pytest.approx(1e30)
    assert [layers[name].values.dtype.itemsize for name in ("big", "small", "many")] == [8, 4, 4]
    assert layers["many"].rows[0] == 2.0**40 and layers["many"].normalized_entropy[0] == pytest.approx(0.7)


@pytest.mark.slow
def test_before_the_window_gaps_grow_with_age_and_the_first_stays():
    history = filled(20 * ONE, 1500)
    kept = steps(history)
    window = min(WINDOW, len(kept) // 2)
    assert kept[0] == 1 and kept[-window:] == list(range(1501 - window, 1501))
    gaps = np.diff(kept[:-window])
    assert len(gaps) >= 10 and gaps.max() > 150 and gaps[-3:].max() < 50
    ages = 1500 - np.array(kept[1:-window])
    assert (gaps[:-1][ages[:-1] > 0] <= 2.0 * ages[:-1][ages[:-1] > 0] + 10).all()


def test_the_largest_score_and_the_lowest_entropy_are_kept():
    history = filled(
        20 * ONE,
        600,
        max_logit=lambda step: 900.0 if step == 77 else 5.0,
        normalized_entropy=lambda step: 0.01 if step == 123 else 0.7,
    )
    assert {1, 77, 123} <= set(steps(history))


@pytest.mark.parametrize("limit", [1, ONE // 2, ONE, 2 * ONE, 5 * ONE])
def test_a_limit_that_holds_next_to_nothing_still_has_the_latest(limit):
    history = History(limit)
    for step in range(1, 30):
        history.append(of_heads(step))
        assert history[-1].step == step
        assert len(history) == 1 or history.bytes <= limit


def test_the_number_of_snapshots_has_a_limit_too():
    history = History()
    for step in range(1, HISTORY_LENGTH + 2):
        history.append(Snapshot(step, {}))
    assert 0.8 * HISTORY_LENGTH < len(history) <= HISTORY_LENGTH


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, None, "64"])
def test_bad_limits(limit):
    with pytest.raises(ValueError, match="expected history_bytes to be an int >= 1, got"):
        History(limit)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_twenty_thousand_log_steps_stay_under_the_bound():
    """The bound is to 2 layers of 32 heads what 64 MB are to 80 layers of 64; bench/history_memory.py has that size."""
    template = snapshot(1, **{f"layers.{i}.attn": dict(heads=32, head_dim=128) for i in range(2)}).layers
    history, traced = History(HISTORY_BYTES * 64 // 5120), []
    tracemalloc.start()
    try:
        for step in range(1, 20_001):
            layers = {name: replace(stats, values=stats.values.copy()) for name, stats in template.items()}
            history.append(Snapshot(step, layers))
            assert history.bytes <= history.limit
            if step % 2_000 == 0:
                traced.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert len(history) > WINDOW and history[0].step == 1
    assert max(traced) < 1.1 * history.limit and traced[-1] - traced[0] < 0.1 * history.limit


# As JSON types


@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_a_snapshot_as_json_types_and_back(kind):
    before = snapshot(7, a=dict(heads=3, max_logit=[0.1, np.inf, np.nan]), b=dict(dtype="bfloat16"))
    for stats in before.layers.values():
        object.__setattr__(stats, "values", stats.values.astype(kind))
    before = Snapshot(7, before.layers, False, Forwards(0, 2, 1))
    after = state.load(json.loads(json.dumps(state.dump(before))))
    assert (after.step, after.training, after.forwards) == (7, False, Forwards(0, 2, 1))
    assert list(after.layers) == ["a", "b"]
    for name, stats in before.layers.items():
        other = after.layers[name]
        assert (other.head_dim, other.dtype, other.sample_period) == (stats.head_dim, stats.dtype, 1)
        assert other.values.dtype == kind
        np.testing.assert_array_equal(other.values, stats.values)


def test_the_fields_of_the_state_name_every_row():
    assert len(state.fields()) == len(set(state.fields())) == of_heads(1).layers["layer"].values.shape[0]
