"""The per-layer table and the issues, as printed."""

import io
from dataclasses import replace

import numpy as np
import pytest
from heads import snapshot
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from hnf_attention import theory
from hnf_attention.diagnosis import StabilityIssue
from hnf_attention.diagnosis.issue import ISSUE_TYPES, SEVERITIES
from hnf_attention.precheck import check_attention_stability
from hnf_attention.report.check import verdict
from hnf_attention.report.fitted import Column, FittedTable
from hnf_attention.report.numbers import number
from hnf_attention.report.tables import STYLES, issue_list, layer_table

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
        number(curvature.max()),
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
        "    threshold 1,000: a paper",
        "    -> a fix",
    ]


def test_issues_are_cut_to_the_worst():
    issues = [replace(ISSUE, layer=f"h.{i}") for i in range(5)]
    text = printed(issue_list(issues, limit=2))
    assert "h.1 " in text and "h.2 " not in text
    assert "... and 3 more groups of issues" in text


def test_no_issues_are_said():
    assert printed(issue_list([])).strip() == "no issues"


WIDTHS = (60, 80, 100, 140)


def table_of(layers, kinds, title="the run, untreated, step 40"):
    """The table of those layers, each with an issue of each kind."""
    issues = [replace(ISSUE, layer=name, issue_type=kind) for name in layers for kind in kinds]
    return layer_table(snapshot(**{name: {} for name in layers}).layers, issues, title)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "layers",
    [
        [f"blocks.{i}.attention" for i in range(4)],
        [f"encoder.layer.{i}.attention.self" for i in range(12)],
        ["model.decoder.layers.11.encoder_attn"],
        ["down_blocks.0.attentions.0.attn1", "mid_block.attentions.0.attn2"],
    ],
    ids=["demo", "bert", "one", "unet"],
)
def test_a_table_of_layers_fits_its_width_with_whole_names(width, layers):
    text = printed(table_of(layers, ["overflow_risk", "entropy_collapse"]), width)
    lines = text.splitlines()
    assert max(map(cell_len, lines)) <= width
    assert "…" not in text
    labels = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
    assert len([label for label in labels if label]) == len(layers)  # no name goes on in a second line
    assert all(any(name.endswith(label) for name in layers) for label in labels)
    assert any(line.startswith("┃") and line.split("┃")[-2].strip() == "issues" for line in lines)
    assert text.count("overflow_risk") == text.count("+1") == len(layers)


def test_a_narrow_table_keeps_what_matters_most_and_names_the_rest():
    layers = [f"blocks.{i}.attention" for i in range(4)]
    shown = {}
    for width in WIDTHS:
        text = " ".join(printed(table_of(layers, ["overflow_risk"]), width).split())
        head, _, rest = text.partition("in a wider terminal: ")
        shown[width] = set(filter(None, rest.split(", ")))
        assert "|score|" in head
    assert shown[60] > shown[80] > shown[100] > shown[140] == set()
    assert {"sink mass", "error bound"} <= shown[80] and "normalized entropy" not in shown[80]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("init_std", [0.02, 0.3])
def test_the_check_before_training_fits_the_console(width, init_std):
    numbers = {"d_model": 4096, "n_heads": 64, "seq_len": 131_072, "n_layers": 80, "init_std": init_std}
    text = printed(verdict(check_attention_stability(config=numbers), "a-design-of-some-length.json"), width)
    assert max(map(cell_len, text.splitlines())) <= width and "…" not in text
    for word in ("sigma", "float8_e4m3fn", "131,072"):
        assert word in text


def test_a_name_longer_than_the_console_goes_on_in_the_next_line():
    name = "a." + "b" * 70
    text = printed(table_of([name], ["overflow_risk"]), 60)
    assert max(map(cell_len, text.splitlines())) <= 60 and "…" not in text
    assert "".join(line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")) == name


def test_columns_of_the_highest_rank_go_first():
    cells = [Text("x" * 10)]
    table = FittedTable("", [Column(title, cells, rank) for title, rank in (("a", 0), ("b", 2), ("c", 1))])
    for width, rest in ((40, ""), (39, "b"), (26, "b, c"), (14, "b, c")):
        text = printed(table, width)
        assert (f"terminal: {rest}" in " ".join(text.split())) == bool(rest), text
        assert text.count("x" * 10) == 3 - len(list(filter(None, rest.split(", "))))


def test_each_severity_has_a_style():
    assert set(SEVERITIES) <= set(STYLES)
    for severity in STYLES:
        assert printed(issue_list([replace(ISSUE, severity=severity)])).startswith(severity)


def test_every_kind_of_issue_fits_the_table():
    text = printed(table_of(["h.0", "h.1"], list(ISSUE_TYPES)), 60)
    assert f"error: {ISSUE_TYPES[0]} +{len(ISSUE_TYPES) - 1}" in " ".join(text.split())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (131072, "131,072"),
        (131072.0, "131,072"),
        (1024, "1,024"),
        (999.94, "999.9"),
        (2047.6, "2,048"),
        (-12345.6, "-12,346"),
        (0.0123456, "0.01235"),
        (0, "0"),
        (6.022e23, "6.022e+23"),
        (float("inf"), "inf"),
    ],
)
def test_numbers_are_whole_and_grouped_from_a_thousand_on(value, text):
    assert number(value) == text
