"""Which rows a sample takes: every row over a period, one block of each stratum, heads apart."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hnf_attention.reference import sampling


def _rows(num_queries, period, phase, batch=2, heads=3):
    return sampling.row_index(batch, heads, num_queries, period, phase, torch.device("cpu"))


@given(num_queries=st.integers(1, 3000), period=st.integers(1, 40))
def test_the_phases_of_a_period_take_every_row_exactly_once(num_queries, period):
    period = sampling.effective_period(period, num_queries)
    taken = torch.cat([_rows(num_queries, period, phase) for phase in range(period)], 2)
    for rows in taken.flatten(0, 1):
        assert torch.equal(rows[rows >= 0].sort().values, torch.arange(num_queries))


@given(num_queries=st.integers(1, 3000), period=st.integers(1, 40), phase=st.integers(0, 100))
def test_one_block_of_every_stratum(num_queries, period, phase):
    period = sampling.effective_period(period, num_queries)
    rows = _rows(num_queries, period, phase % period)
    assert rows.shape == (2, 3, sampling.num_rows(num_queries, period))
    blocks = rows.unflatten(2, (-1, sampling.BLOCK_ROWS))
    inside = blocks >= 0
    stratum = torch.arange(blocks.shape[2])[:, None]
    assert torch.equal((blocks // (sampling.BLOCK_ROWS * period)).masked_select(inside),
                       stratum.expand(blocks.shape).masked_select(inside))  # fmt: skip
    first = blocks[..., :1]
    consecutive = (first + torch.arange(sampling.BLOCK_ROWS)).masked_select(inside)
    assert torch.equal(blocks.masked_select(inside), consecutive) and (first % sampling.BLOCK_ROWS <= 0).sum()
    assert inside[:, :, :-1].all(), "only the last stratum may come out empty or short"


@pytest.mark.parametrize(
    ("num_queries", "period", "expected"), [(1, 16, 1), (64, 16, 1), (65, 16, 2), (4096, 16, 16)]
)
def test_a_short_sequence_is_never_skipped(num_queries, period, expected):
    assert sampling.effective_period(period, num_queries) == expected
    for phase in range(expected):
        assert (_rows(num_queries, expected, phase) >= 0).any(-1).all()


def test_heads_and_sequences_look_at_different_positions():
    """Along batch, heads and strata alike, 32 picks spread over the 16 blocks of a stratum."""
    blocks = _rows(32 * 16 * 64, 16, 5, batch=32, heads=32)[..., ::64] // 64 % 16
    for dim in range(3):
        for picks in blocks.movedim(dim, -1).flatten(0, 1):
            counts = torch.bincount(picks, minlength=16)
            assert counts.min() >= 1 and counts.max() <= 4
