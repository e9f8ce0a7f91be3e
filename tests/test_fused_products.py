"""What a compiler may fuse: a product with the subtraction after it, which then is not 0 where both sides are equal.

Triton's interpreter fuses nothing, so without a card these tests hold with and without the repairs.
"""

import math

import pytest
import torch

from hnf_attention import attention, attention_stats
from hnf_attention.kernels.portable import forward
from hnf_attention.statistics.rows import RowStats

ON_GPU = torch.cuda.is_available()
HALVES = [torch.float16, torch.bfloat16] if ON_GPU else [torch.float16]


def rows_of(query, key, value, **given):
    """The extended statistics of the portable forward."""
    from hnf_attention.engine.call import check

    defaults = dict.fromkeys(("attn_mask", "scale", "window_size", "softcap", "sinks")) | {"is_causal": False}
    options = check(query, key, value, **defaults | given)
    return RowStats.unpack(*forward.forward(query, key, value, options, extended=True)[1:])


@pytest.mark.parametrize("number", [4001, pytest.param(201, marks=pytest.mark.slow)])
@pytest.mark.parametrize("scale", [0.3, pytest.param(-0.3, marks=pytest.mark.slow)])
def test_the_largest_score_of_a_row_in_fp32_has_a_share_of_one(number, scale, device):
    """Its exponent was the rounding error of its product with the scale: max_weight was off by e^2 at 4e7."""
    # Whole numbers, so that q.k is exact and its product with the scale is not.
    query = torch.arange(number, number + 40.0, device=device).view(1, 1, 40, 1)
    key = torch.full((1, 1, 70, 1), 3001.0, device=device)
    rows = rows_of(query, key, key, scale=scale)
    ties = torch.full_like(rows.lse, math.log(70))
    torch.testing.assert_close(rows.log_denominator, ties, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows.max_weight, torch.full_like(ties, 1 / 70), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(rows.tie_mass, torch.ones_like(ties), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows.entropy, ties, rtol=1e-5, atol=1e-5)
    key[:, :, 1:] *= -1 if scale > 0 else 1
    key[:, :, 0] *= 1 if scale > 0 else -1  # one key has all the weight
    alone = rows_of(query, key, key, scale=scale)
    assert (alone.max_weight == 1).all() and not alone.entropy.any() and not alone.log_denominator.any()


@pytest.mark.parametrize("softcap", [0.7, pytest.param(5.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_soft_cap_over_large_scores_leaves_the_entropy_of_ties_exact(dtype, softcap, device):
    """`raw - raw` added the rounding error of raw = scale * q.k to the entropy: found by tests/fuzz.py on a card."""
    query = torch.full((1, 1, 19, 1), 3.3e3, device=device).to(dtype)
    key = torch.full((1, 1, 70, 1), 2.1e3, device=device).to(dtype)
    for scale in (-0.3, 0.7):
        given = {"softcap": softcap, "scale": scale}
        for rows in (rows_of(query, key, key, **given), attention(query, key, key, **given)[1],
                     attention_stats(query, key, **given)):  # fmt: skip
            torch.testing.assert_close(
                rows.entropy, torch.full_like(rows.lse, math.log(70)), rtol=1e-5, atol=1e-5
            )
