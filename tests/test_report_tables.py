"""The per-layer table and the issues, as printed."""

import io
from dataclasses import replace

import numpy as np
from heads import snapshot
from rich.console import Console

from hnf_attention import theory
from hnf_attention.diagnosis import StabilityIssue
from hnf_attention.report.tables import issue_list, layer_table

ISSUE = StabilityIssue("h.1.attn", 2, "overflow_risk", "error", 2e3, 1e3, "a paper", "evidence", "a fix")


def printed(renderable, width=140):
    stream = io.StringIO()
    Console(file=stream, width=width).print(renderable)
    return stream.getvalue()


def row(text, label):
    line = next(line for line in text.splitlines() if f" {label} " in line)
    return [cell.strip() for cell in line.strip("│ ").split("│")]


def test_a_row_is_the_mean_ratio_and_the_worst_head():
    ratios = [0.2, 0.4, 0.6]
    layers = snapshot(
        **{
            "h.0.attn": dict(heads=3, normalized_entropy=ratios, max_weight=[0.1, 0.9, 0.3], min_logit=-50.0),
            "h.1.attn": dict(heads=3, sink_mass=[0.5, 0.1, 0.0]),
        }
    ).layers
    text = printed(layer_table(layers, [ISSUE], "title"))
    assert text.startswith("title")
    stats = layers["h.0.attn"]
    curvature = theory.hnf_curvature_bound(stats.query_norm, stats.key_norm, 64, stats.max_abs_logit)
    assert row(text, "0.attn") == [
        "0.attn",
        "3",
        f"{np.mean(ratios):.2f}",
        f"{stats.normalized_entropy_p10.min():.2f}",
        "0.90",
        "0.05",
        "50",
        f"{curvature.max():.4g}",
        f"{stats.error_bound.max():.2g}",
        f"{stats.required_bits.max():.0f}",
        "ok",
    ]
    assert row(text, "1.attn")[5] == "0.50"
    assert row(text, "1.attn")[-1] == "error: overflow_risk"


def test_further_kinds_of_issues_are_counted():
    layers = snapshot(**{"h.1.attn": {}}).layers
    more = [ISSUE, replace(ISSUE, head=0), replace(ISSUE, issue_type="one_hot_attention", severity="warning")]
    assert "error: overflow_risk +1" in printed(layer_table(layers, more, ""))


def test_a_layer_without_issues_is_ok_only_if_it_is_finite_and_judged():
    layers = snapshot(fine={}, broken={"nonfinite_out": 1}, short={"judged_rows": 0.0}).layers
    text = printed(layer_table(layers, [], ""))
    assert [row(text, name)[-1] for name in layers] == ["ok", "NaN or inf", "not judged"]


def test_unknown_numbers_are_dashes_and_brackets_are_no_markup():
    layers = snapshot(
        **{"attn [4 heads of 8, float16]": dict(judged_rows=0.0, max_logit=-np.inf, min_logit=np.inf)}
    )
    text = printed(layer_table(layers.layers, [], "model [red]"))
    assert "attn [4 heads of 8, float16]" in text and "model [red]" in text
    assert row(text, "attn [4 heads of 8, float16]")[2] == "-"


def test_issues_say_where_why_and_what_to_do():
    lines = printed(issue_list([ISSUE, replace(ISSUE, head=3, value=1.5e3)])).splitlines()
    assert [line.rstrip() for line in lines] == [
        "error: overflow_risk in h.1.attn heads 2-3",
        "    evidence",
        "    threshold 1000: a paper",
        "    -> a fix",
    ]


def test_issues_are_cut_to_the_worst():
    issues = [replace(ISSUE, layer=f"h.{i}") for i in range(5)]
    text = printed(issue_list(issues, limit=2))
    assert "h.1 " in text and "h.2 " not in text
    assert "... and 3 more groups of issues" in text


def test_no_issues_are_said():
    assert printed(issue_list([])).strip() == "no issues"
