"""What the figures draw is what the statistics say."""

import numpy as np
import pytest
from heads import snapshot
from matplotlib.backends.backend_agg import FigureCanvasAgg

from hnf_attention import theory
from hnf_attention.figures import curvature_evolution, layer_labels
from hnf_attention.figures import entropy_heatmap as heatmap
from hnf_attention.figures import max_logit_evolution as evolution
from hnf_attention.statistics.heads import Snapshot

SINK_MASS, LIMITS = 0.3, {"clipped": 100.0, "worse": 1e3, "diverged": 1e4}


def entropy_heatmap(snapshot):
    return heatmap(snapshot, SINK_MASS)


def max_logit_evolution(history):
    return evolution(history, LIMITS)


@pytest.fixture
def mixed():
    """Two layers with different head counts; head 1 of the second is a sink."""
    return snapshot(
        40,
        **{
            "model.layers.0.attn": dict(heads=3, normalized_entropy=[0.1, 0.5, 0.9]),
            "model.layers.1.attn": dict(heads=2, normalized_entropy=[0.7, 0.2], sink_mass=[0.05, 0.6]),
        },
    )


@pytest.fixture
def history():
    """Scores that grow in one of the heads; the second layer is missing at step 20."""
    growing = [
        {
            "h.0.attn": dict(heads=2, max_logit=[3.0, 10.0 * s], query_norm=[4.0, 8.0]),
            "h.1.attn": {"min_logit": -7.0 * s},
        }
        for s in (1, 2, 3)
    ]
    del growing[1]["h.1.attn"]
    return [snapshot(10 * (i + 1), **layers) for i, layers in enumerate(growing)]


def axes_of(figure):
    assert isinstance(figure.canvas, FigureCanvasAgg)
    return figure.axes[0]


def lines_of(figure):
    """{label: (x, y)} of the drawn layers, without the limits' dashed lines."""
    lines = [line for line in axes_of(figure).lines if line.get_linestyle() == "-"]
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in lines}


def test_heatmap_draws_the_mean_normalized_entropy_of_every_head(mixed):
    axes = axes_of(entropy_heatmap(mixed))
    drawn = axes.images[0].get_array()
    expected = [stats.normalized_entropy for stats in mixed.layers.values()]
    np.testing.assert_array_equal(drawn[0], expected[0])
    np.testing.assert_array_equal(drawn[1, :2], expected[1])
    assert drawn.mask.tolist() == [[False] * 3, [False, False, True]]  # the second layer has no third head
    assert axes.images[0].get_clim() == (0.0, 1.0)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0.attn", "1.attn"]
    assert axes.get_xlabel() == "head"
    assert "step 40" in axes.get_title(loc="left")


def test_heatmap_names_numbers_and_marks_sinks_in_their_cells(mixed):
    cells = {t.get_position(): t.get_text() for t in axes_of(entropy_heatmap(mixed)).texts}
    assert cells == {(0, 0): "0.10", (1, 0): "0.50", (2, 0): "0.90", (0, 1): "0.70", (1, 1): "0.20 S"}


def test_heatmap_of_many_heads_keeps_only_the_sink_marks():
    sinks = np.zeros(32)
    sinks[5] = 0.8
    axes = axes_of(entropy_heatmap(snapshot(**{"attn": dict(heads=32, sink_mass=sinks)})))
    assert [(t.get_position(), t.get_text()) for t in axes.texts if t.get_text()] == [((5, 0), "S")]


def test_heatmap_leaves_unjudged_heads_out():
    axes = axes_of(entropy_heatmap(snapshot(**{"attn": dict(heads=2, judged_rows=[1000.0, 0.0])})))
    assert axes.images[0].get_array().mask.tolist() == [[False, True]]


def test_max_logit_lines_are_the_worst_head_of_each_layer(history):
    figure = max_logit_evolution(history)
    assert lines_of(figure) == {
        "0.attn": ([10, 20, 30], [10.0, 20.0, 30.0]),
        "1.attn": ([10, 30], [7.0, 21.0]),  # |min| is the larger
    }
    axes = axes_of(figure)
    assert (axes.get_xlabel(), axes.get_yscale()) == ("training step", "log")
    assert "nats" in axes.get_ylabel()


def test_max_logit_shows_limits_only_near_the_data(history):
    def limits(snapshots):
        lines = axes_of(max_logit_evolution(snapshots)).lines
        return [line.get_ydata()[0] for line in lines if line.get_linestyle() == "--"]

    assert limits(history) == []
    assert limits([snapshot(1, attn={"max_logit": 900.0})]) == [100.0, 1e3]


def test_curvature_lines_are_log2_of_the_bound(history):
    figure = curvature_evolution(history)
    for label, (steps, values) in lines_of(figure).items():
        layers = [(s.step, s.layers[f"h.{label}"]) for s in history if f"h.{label}" in s.layers]
        assert steps == [step for step, _ in layers]
        expected = [
            theory.hnf_curvature_bound(x.query_norm, x.key_norm, x.head_dim, x.max_abs_logit).max()
            for _, x in layers
        ]
        np.testing.assert_allclose(values, expected)
    assert "bits" in axes_of(figure).get_ylabel()


def test_a_head_without_finite_rows_is_a_gap(history):
    broken = snapshot(40, **{"h.0.attn": dict(heads=1, max_logit=-np.inf, min_logit=np.inf)})
    steps, values = lines_of(max_logit_evolution([*history, broken]))["0.attn"]
    assert steps[-1] == 40 and np.isnan(values[-1])


def test_many_layers_get_a_colour_bar_instead_of_a_legend():
    many = snapshot(**{f"h.{i}": {} for i in range(20)})
    figure = max_logit_evolution([many, many])
    assert figure.axes[0].get_legend() is None
    colours = figure.axes[1].collections[-1].cmap.colors
    np.testing.assert_allclose([line.get_color() for line in figure.axes[0].lines], colours)


def test_one_snapshot_draws_every_head_and_names_the_worst(mixed):
    axes = axes_of(curvature_evolution([mixed]))
    drawn = [points.get_xydata() for points in axes.lines]
    for place, (points, stats) in enumerate(zip(drawn, mixed.layers.values(), strict=True)):
        np.testing.assert_allclose(points, [[place, value] for value in stats.log2_curvature])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.attn", "1.attn"]
    worst = [f"head {stats.log2_curvature.argmax()}" for stats in mixed.layers.values()]
    assert [text.get_text() for text in axes.texts] == worst
    assert "every head, one snapshot (step 40)" in axes.get_title(loc="left")


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="at least one layer"):
        entropy_heatmap(Snapshot(1, {}))
    for draw in (max_logit_evolution, curvature_evolution):
        with pytest.raises(ValueError, match="at least one snapshot"):
            draw([])


@pytest.mark.parametrize(
    "draw", [entropy_heatmap, lambda s: max_logit_evolution([s]), lambda s: curvature_evolution([s])]
)
def test_figures_are_written(draw, mixed, tmp_path):
    draw(mixed).savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["model.layers.0.attn", "model.layers.10.attn"], ["0.attn", "10.attn"]),
        (["encoder.0.self", "decoder.0.self"], ["encoder.0.self", "decoder.0.self"]),
        (["a.b", "a.b.c"], ["b", "b.c"]),
        (["model.attn"], ["model.attn"]),
        ([""], ["(model)"]),
    ],
)
def test_layer_labels_drop_what_all_share(names, labels):
    assert layer_labels(names) == labels
