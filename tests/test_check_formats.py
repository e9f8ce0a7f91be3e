"""What `check` says of number formats: the words follow the numbers."""

import numpy as np
import pytest
import torch

from hnf_attention import check_attention_stability

PLAIN = {"d_model": 128, "n_heads": 8, "seq_len": 256}
SHARP = PLAIN | {"init_std": 0.3}
LONG = {"d_model": 8192, "n_heads": 64, "seq_len": 131072}
FORMATS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
FORMATS |= {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}


def test_formats_fail_in_the_order_of_their_bits():
    harsh = PLAIN | {"init_std": 1.0, "d_model": 4096, "n_heads": 32}
    report = check_attention_stability(config=harsh)
    assert not report["float16_safe"] and report["dtypes"]["float32"]["status"] != "unsafe"
    assert "q.k in float16 before scaling" not in report["dtypes"]["bfloat16"]["overflows"]
    assert "q.k in float16 before scaling" in report["dtypes"]["float16"]["overflows"]
    assert any("float16 has 11 significand bits" in text for text in report["recommendations"])
    assert "float16: unsafe; overflows: q.k in float16 before scaling" in report.summary()
    mild = check_attention_stability(config=PLAIN)["dtypes"]
    assert mild["float32"]["status"] == "safe" and mild["bfloat16"]["status"] != "unsafe"


@pytest.mark.parametrize(
    "config", [PLAIN, SHARP, LONG, PLAIN | {"seq_len": 8}, PLAIN | {"temperature": 1e-9}]
)
@pytest.mark.parametrize("tolerance", [1e-3, 0.01, 0.2])
def test_the_status_is_what_the_numbers_beside_it_say(config, tolerance):
    report = check_attention_stability(config=config, tolerance=tolerance)
    single = report["dtypes"]["float32"]["error_bound"]
    for found in report["dtypes"].values():
        enough = found["bits"] >= found["typical_bits"] and found["error_bound"] - single <= tolerance
        proved = enough and found["bits"] >= found["sound_bits"] and found["error_bound"] <= tolerance
        expected = "unsafe" if found["overflows"] or not enough else "safe" if proved else "usually safe"
        assert found["status"] == expected, found


def test_fp8_is_not_called_safe_beside_an_error_of_the_size_of_the_values():
    for config in (PLAIN, SHARP, LONG):
        found = check_attention_stability(config=config)["dtypes"]
        assert found["float8_e4m3fn"]["status"] == found["float8_e5m2"]["status"] == "unsafe"
        assert (found["bfloat16"]["status"] == "unsafe") == (config is SHARP)  # whose rows one key holds
    wide = check_attention_stability(config=PLAIN, tolerance=0.3)["dtypes"]
    assert wide["float8_e5m2"]["status"] == "usually safe" and wide["float8_e5m2"]["error_bound"] < 0.3


def test_rows_that_rounding_turns_over_need_many_bits():
    """The largest of enormous scores is another key after rounding. What that takes does not depend on their size."""
    saturated = [check_attention_stability(config=PLAIN | {"temperature": t}) for t in (1e-9, 1e-20)]
    bits = {report["typical_bits_needed"] for report in saturated}
    assert len(bits) == 1 and bits.pop() >= 5


def attended(q, k, v, dtype):
    scores = q.to(dtype).double() @ k.to(dtype).double().T / 4.0
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights.to(dtype).double() @ v / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("name", FORMATS)
def test_usual_bits_keep_the_tolerance_in_most_rows(name):
    """q, k and the weights are rounded to the format, of random designs, beside fp64."""
    generator = torch.Generator().manual_seed(0)
    within = {True: [], False: []}
    for init in (0.02, 0.1, 0.2, 0.3, 0.5):
        report = check_attention_stability(config=PLAIN | {"init_std": init})
        found, std = report["dtypes"][name], init * 128**0.5
        q, k = (std * torch.randn(n, 16, generator=generator, dtype=torch.float64) for n in (64, 256))
        v = torch.rand(256, 8, generator=generator, dtype=torch.float64)

        exact = attended(q, k, v, torch.float64)
        error = ((attended(q, k, v, FORMATS[name]) - exact).abs() / (v.amax(0) - v.amin(0))).amax(-1)
        within[found["bits"] >= found["typical_bits"]].append(
            float((error <= report["tolerance"]).double().mean())
        )
    assert all(share >= 0.9 for share in within[True]) and within[True] + within[False]
    assert np.all(np.array(within[False]) < 1.0)
