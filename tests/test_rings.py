"""Sequences split over two and four processes: their rings report what one process reports of the whole sequence."""

import pickle

import numpy as np
import pytest
import torch
from processes import needs_gloo, start
from processes_rings import LONG, MASK, Flex, Full, SeparateAttention, X, causal, main, run, sharp, watched
from rings import places
from sharded_models import EXAMPLE, HEADS

from hnf_attention import AttentionStabilityMonitor
from hnf_attention.statistics.fields import NUM_FIELDS, SUM_FIELDS

pytestmark = [
    pytest.mark.slow,
    needs_gloo,
]
# Blocks of 64 rows begin anew in each process, and each finds the sinks of its own queries.
EXACT = np.array(
    [not (x.endswith("_blocks") or x in ("sink_mass", "rest_entropy", "stray_rows")) for x in SUM_FIELDS]
    + [True] * (NUM_FIELDS - len(SUM_FIELDS))
)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.exhaustive)])
def found(request, tmp_path_factory):
    """By scenario, what each process found."""
    folder = tmp_path_factory.mktemp("rings")
    start(main, (request.param, str(folder)), request.param)
    each = [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(request.param)]
    return {scenario: [process[scenario] for process in each] for scenario in each[0]}


@pytest.fixture(scope="module")
def one():
    """(snapshot, issues) of the whole sequence in this process: causal, without a causal mask, with a query mask."""
    kinds = {True: (SeparateAttention, None), False: (Full, None), "mask": (SeparateAttention, MASK)}
    found = {name: watched(sharp(kind), X, None, mask) for name, (kind, mask) in kinds.items()}
    return {name: (snapshots[0], issues) for name, (_, snapshots, issues, _) in found.items()}


def same(layers, expected, fields=EXACT):
    """Up to the last digits, which differ between matrix products of other shapes."""
    assert list(layers) == list(expected)
    for name, stats in layers.items():
        assert (stats.head_dim, stats.dtype) == (expected[name].head_dim, expected[name].dtype)
        np.testing.assert_allclose(
            stats.values[fields], expected[name].values[fields], rtol=1e-5, atol=1e-5, err_msg=name
        )


def test_pytorchs_ring_reports_the_whole_sequence_and_trains_bit_equal(found, one):
    for process in found["pytorch"]:
        for (kind, *_), (bit_equal, snapshots, issues, coverage) in (
            (key, value) for key, value in process.items() if len(key) == 3
        ):
            expected, expected_issues = one[kind]
            assert bit_equal and len(snapshots) == 2
            same(snapshots[0], expected)
            assert issues == expected_issues
            assert set(coverage.measured.values()) == {"probe (context_parallel)"}
            assert not coverage.not_measured
    assert one[True][1], "expected the model to have an issue"


def test_pytorchs_ring_is_measured_in_whichever_order_it_is_entered(found, one):
    for process in found["pytorch"]:
        same(process["monitor first"], one[True][0])


def test_a_query_mask_holds_for_the_queries_of_each_process(found, one):
    left_out = int((~MASK).sum())
    assert one["mask"][0]["0"].left_out_rows.tolist() == [left_out] * HEADS
    for process in found["pytorch"]:
        for balanced in (True, False):
            same(process["mask", balanced][1][0], one["mask"][0])


def test_modules_that_are_wrapped_for_context_parallelism_are_measured(found, one):
    for snapshots, issues, coverage in found["wrapped"]:
        layers = {name.removesuffix(".product"): stats for name, stats in snapshots[0].items()}
        same(layers, one[True][0])
        assert [(layer.removesuffix(".product"), *rest) for layer, *rest in issues] == one[True][1]
        assert set(coverage.measured.values()) == {"probe (context_parallel)"}


def test_a_process_without_a_monitor_keeps_none_waiting_and_the_every_step_tier_is_said_to_be_off(found):
    coverage, snapshots = found["resting"][0]
    assert snapshots == 1
    reason = "extremes at measured steps only: its keys come in blocks, which are not kept"
    assert all(how == f"probe (context_parallel), {reason}" for how in coverage.measured.values())


def test_the_examples_ring_is_trained_and_monitored_as_in_one_process(found, one):
    if not EXAMPLE.is_file():
        pytest.skip("the examples are in the checkout only")
    numbers = list(run(sharp(), X, 1))[-1]
    for order in ("contiguous", "zigzag"):
        each = [process[order] for process in found["example"]]
        for rank, (theirs, bit_equal, snapshots, issues, coverage) in enumerate(each):
            rows = places(rank, len(each), X.shape[1], order == "zigzag")
            for mine, whole in zip(theirs[:2], numbers[:2]):  # output and gradient of the input
                torch.testing.assert_close(mine, whole[:, rows], rtol=1e-3, atol=1e-3)
            assert bit_equal
            same(snapshots[0], one[True][0])
            assert issues == one[True][1]
            assert set(coverage.measured.values()) == {"probe (observe_blocks)"}
        for number, whole in enumerate(numbers[2:], 2):  # gradients of weights are summed over processes
            total = sum(theirs[number] for theirs, *_ in each)
            torch.testing.assert_close(total, whole, rtol=1e-3, atol=1e-3)


def test_ulysses_heads_get_their_global_numbers(found, one):
    for snapshots, issues, _ in found["ulysses"]:
        same(snapshots[0], one[True][0], slice(None))
        assert issues == one[True][1]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_attention_under_context_parallelism_is_measured(found):
    if "flex" not in found:
        pytest.skip("four processes show it")
    from torch.nn.attention.flex_attention import create_block_mask

    model = sharp(Flex)
    for layer in model:
        layer.mask = create_block_mask(causal, 1, HEADS, LONG.shape[1], LONG.shape[1], "cpu")
    with AttentionStabilityMonitor(model, log_every=1) as monitor, torch.no_grad():
        model(LONG)
        monitor.on_step()
    expected = monitor.history[0].layers
    for layers, coverage in found["flex"]:
        assert all("flex_attention" in how for how in coverage.measured.values())
        same(layers, expected)
