"""`stability_region`: its boundary is where a check says the limit is, in closed form and by bisection."""

import json

import numpy as np
import pytest

from hnf_attention import check_attention_stability, stability_region

BASE = {"d_model": 256, "n_heads": 4, "seq_len": 512, "init_std": 0.05}


def checked(d_model, seq_len, temperature, **options):
    config = BASE | {
        "d_model": d_model,
        "n_heads": d_model // 64,
        "seq_len": seq_len,
        "temperature": temperature,
    }
    return check_attention_stability(config=config | options)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"qk_norm": True}])
def test_the_boundary_is_where_a_check_meets_the_limits(options):
    region = stability_region(BASE | options, dims=[128, 512], lengths=[64, 4096], curvature_limit=40.0)
    assert region.exact == ("softcap" not in options)
    for i, d_model in enumerate(region.dims):
        for j, length in enumerate(region.lengths):
            spread, curvature = region.by_spread[i, j], region.by_curvature[i, j]
            if 0 < spread < np.inf:
                found = checked(int(d_model), int(length), float(spread), **options)
                assert found["sigma_ratio"] == pytest.approx(0.5, rel=1e-6)
            if 0 < curvature < np.inf:
                found = checked(int(d_model), int(length), float(curvature), **options)
                assert found["log2_curvature_bound"] == pytest.approx(40.0, rel=1e-6)


def test_the_grid_is_the_boundary_at_the_given_temperatures():
    region = stability_region(BASE, temperatures=[0.5, 1.0, 4.0])
    assert region.stable.shape == (3, len(region.dims), len(region.lengths))
    np.testing.assert_array_equal(region.stable, np.array([0.5, 1.0, 4.0])[:, None, None] >= region.boundary)
    assert (np.diff(region.stable.astype(int), axis=0) >= 0).all()  # warmer is never less stable


def test_a_wider_model_needs_a_higher_temperature_and_a_longer_one_a_lower_one_by_spread():
    region = stability_region(BASE)
    assert (np.diff(region.by_spread, axis=0) > 0).all() and (np.diff(region.by_spread, axis=1) < 0).all()
    assert (np.diff(region.by_curvature, axis=1) > 0).all()


def test_the_number_of_heads_can_be_held_instead_of_their_size():
    region = stability_region(BASE, dims=[64, 128], hold="n_heads")
    found = check_attention_stability(
        config=BASE | {"d_model": 64, "n_heads": 4, "temperature": float(region.by_spread[0, 3])}
    )
    assert found["sigma_ratio"] == pytest.approx(0.5)


def test_no_temperature_is_stable_if_the_norms_alone_pass_the_limit():
    region = stability_region(BASE | {"init_std": 1e12})
    assert np.isinf(region.boundary).all() and not region.stable.any()
    document = json.loads(json.dumps(region.to_dict(), allow_nan=False))
    assert document["boundary"][0][0] is None
    region.plot()


def test_table_and_figure(tmp_path):
    region = stability_region(BASE, dims=[256], lengths=[128, 512])
    lines = region.table().splitlines()
    assert lines[0] == "| d_model | 128 | 512 |" and lines[2].startswith("| 256 | ")
    region.plot(tmp_path / "region.png")
    assert (tmp_path / "region.png").read_bytes().startswith(b"\x89PNG")


def test_a_region_is_shown_in_one_line():
    region = stability_region(BASE, dims=[128, 512], lengths=[64, 256], temperatures=[0.5, 4.0])
    shown = "d_model 128 to 512, length 64 to 256, temperature 0.5 to 4"
    assert repr(region) == f"StabilityRegion({shown}: {region.stable.mean():.0%} of 8 stable)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hold": "width"}, "hold in .* got 'width'"),
        ({"dims": [100]}, "divide into heads of 64, got 100"),
        ({"dims": [10], "hold": "n_heads"}, "divide into 4 heads, got 10"),
        ({"dims": []}, "dims to be integers of at least 1"),
        ({"lengths": [0]}, "lengths to be integers of at least 1"),
        ({"temperatures": [-1.0]}, "temperatures to be a finite number above 0, got -1"),
        ({"ratio_limit": 0}, "ratio_limit to be a finite number above 0"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        stability_region(BASE, **options)


@pytest.mark.parametrize(("d_model", "n_heads"), [(64, 1), (96, 1), (128, 2)])
def test_the_default_widths_of_a_design_of_few_heads_divide_into_them(d_model, n_heads):
    region = stability_region(BASE | {"d_model": d_model, "n_heads": n_heads})
    assert d_model in region.dims and not (region.dims % (d_model // n_heads)).any()
