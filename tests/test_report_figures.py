"""What the figures draw is what the statistics say."""

import sys
import time

import numpy as np
import pytest
from heads import snapshot
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hnf_attention import theory
from hnf_attention.diagnosis import diagnose
from hnf_attention.figures import (
    before_after,
    bits_evolution,
    curvature_evolution,
    entropy_evolution,
    forecast_figure,
    layer_labels,
)
from hnf_attention.figures import entropy_heatmap as heatmap
from hnf_attention.figures import score_range_evolution as evolution
from hnf_attention.statistics.heads import Snapshot

SINK_MASS, LIMITS = 0.3, {"clipped": 100.0, "worse": 1e3, "diverged": 1e4}


def entropy_heatmap(snapshot):
    return heatmap(snapshot, SINK_MASS)


def score_range_evolution(history):
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


def axes_of(axes):
    assert isinstance(axes.figure.canvas, FigureCanvasAgg)
    return axes


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
    assert not axes.texts and axes.collections[0].get_offsets().tolist() == [[5, 0]]
    assert "dot: sink" in axes.get_title(loc="left")


@pytest.mark.slow
def test_heatmap_of_a_large_model_is_drawn_at_once_and_stays_small():
    large = snapshot(**{f"layers.{i}": dict(heads=128, sink_mass=0.5) for i in range(126)})
    start = time.process_time()
    axes = entropy_heatmap(large)
    axes.figure.canvas.draw()
    assert time.process_time() - start < 2.0
    assert not axes.texts and len(axes.get_yticks()) <= 40
    assert (axes.figure.get_size_inches() <= 14.0).all()


def test_heatmap_leaves_unjudged_heads_out():
    axes = axes_of(entropy_heatmap(snapshot(**{"attn": dict(heads=2, judged_rows=[1000.0, 0.0])})))
    assert axes.images[0].get_array().mask.tolist() == [[False, True]]


def test_score_lines_are_the_worst_head_of_each_layer(history):
    axes = score_range_evolution(history)
    assert lines_of(axes) == {
        f"{place}.attn": (
            [s.step for s in history if f"h.{place}.attn" in s.layers],
            [
                s.layers[f"h.{place}.attn"].logit_range_max.max()
                for s in history
                if f"h.{place}.attn" in s.layers
            ],
        )
        for place in (0, 1)
    }
    assert (axes.get_xlabel(), axes.get_yscale()) == ("training step", "log")
    assert "nats" in axes.get_ylabel()


def test_scores_show_limits_only_near_the_data(history):
    def limits(snapshots):
        lines = axes_of(score_range_evolution(snapshots)).lines
        return [line.get_ydata()[0] for line in lines if line.get_linestyle() == "--"]

    assert limits(history[:1]) == []
    assert limits([snapshot(1, attn={"max_logit": 450.0})]) == [100.0, 1e3]


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
    steps, values = lines_of(score_range_evolution([*history, broken]))["0.attn"]
    assert steps[-1] == 40 and np.isnan(values[-1])


def test_many_layers_get_a_colour_bar_instead_of_a_legend():
    many = snapshot(**{f"h.{i}": {} for i in range(20)})
    axes = score_range_evolution([many, many])
    assert axes.get_legend() is None
    colours = axes.figure.axes[1].collections[-1].cmap.colors
    np.testing.assert_allclose([line.get_color() for line in axes.lines], colours)


def test_one_snapshot_draws_every_head_and_names_the_worst(mixed):
    axes = axes_of(curvature_evolution([mixed]))
    drawn = [points.get_xydata() for points in axes.lines]
    for place, (points, stats) in enumerate(zip(drawn, mixed.layers.values(), strict=True)):
        np.testing.assert_allclose(points, [[place, value] for value in stats.log2_curvature])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.attn", "1.attn"]
    worst = [f"head {stats.log2_curvature.argmax()}" for stats in mixed.layers.values()]
    assert [text.get_text() for text in axes.texts] == worst
    assert "every head, one snapshot (step 40)" in axes.get_title(loc="left")


def test_bits_are_drawn_with_what_the_format_holds(history):
    axes = bits_evolution(history, {"bfloat16": 8.0})
    (steps, values) = lines_of(axes)["0.attn"]
    assert values == [s.layers["h.0.attn"].required_bits.max() for s in history]
    assert "8: bfloat16" in [text.get_text() for text in axes.texts]


def test_entropy_lines_are_the_heads_of_the_layer_with_the_lowest(history):
    low = [
        snapshot(s, a=dict(heads=2), b=dict(heads=5, normalized_entropy=[0.7, 0.6, 0.5, 0.9, 0.1 / s]))
        for s in (1, 2)
    ]
    axes = entropy_evolution(low, {"collapsed": 0.2})
    assert "of b, 5 heads" in axes.get_title(loc="left")
    named = {
        line.get_label(): list(line.get_ydata()) for line in axes.lines if line.get_label().startswith("head")
    }
    assert named == {"head 4": [0.1, 0.05], "head 2": [0.5, 0.5], "head 1": [0.6, 0.6]}
    assert len([line for line in axes.lines if line.get_color() == "#aaaaaa"]) == 5
    assert "0.2: collapsed" in [text.get_text() for text in axes.texts]
    with pytest.raises(ValueError, match="expected layer to be one of 'a', 'b', got 'c'"):
        entropy_evolution(low, {}, "c")


def test_before_and_after_tell_who_became_calmer():
    before = snapshot(10, a=dict(max_logit=[50.0, 5.0, 5.0, 5.0]), gone=dict())
    after = snapshot(20, a=dict(max_logit=[10.0, 5.0, 5.1, 20.0]))
    axes = before_after(before, after, {"limit": 30.0, "far": 1e6})
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines if ":" in line.get_label()}
    assert drawn == {
        "calmer: 1": [[100.0, 20.0]],
        "as before: 2": [[10.0, 10.0], [10.0, 10.2]],
        "worse: 1": [[10.0, 40.0]],
    }
    assert {text.get_text() for text in axes.texts} == {"30: limit", "a head 0", "a head 3"}
    with pytest.raises(ValueError, match="share a layer"):
        before_after(before, snapshot(20, b=dict()), {})


def test_a_forecast_is_drawn_with_its_interval(history):
    axes = forecast_figure(history, "h.0.attn", 1, "logit_range_max", 200.0, 70.0, (40.0, 300.0))
    (bars,) = axes.containers
    assert bars.lines[0].get_xydata().tolist() == [[70.0, 200.0]]
    assert bars.lines[2][0].get_segments()[0].tolist() == [[40.0, 200.0], [300.0, 200.0]]
    measured = axes.lines[0].get_xydata().tolist()
    assert measured == [[s.step, s.layers["h.0.attn"].logit_range_max[1]] for s in history]
    assert (
        "(nats)" in axes.get_ylabel()
        and "step 70, 40 to 300 in four of five" in axes.get_legend().texts[1].get_text()
    )
    with pytest.raises(ValueError, match="got head 9 of layer 'h.0.attn'"):
        forecast_figure(history, "h.0.attn", 9, "logit_range_max", 200.0, 70.0)


@pytest.mark.slow
def test_a_diagnosis_draws_every_figure(tmp_path):
    grown = [snapshot(s, a={"max_logit": (2 + 0.08 * s) ** 2}) for s in range(10, 61, 10)]
    diagnosis = diagnose(grown)
    for draw in (
        diagnosis.plot_entropy_evolution,
        diagnosis.plot_score_range_evolution,
        diagnosis.plot_bits_evolution,
    ):
        assert isinstance(draw(tmp_path / "a.png"), Axes)
    assert "8: " not in diagnosis.plot_bits_evolution().texts[0].get_text()  # float32 holds 24
    assert diagnosis.plot_forecast().get_title(loc="left") == "a head 0: forecast of step 60"
    assert diagnosis.plot_before_after(30).get_xlabel() == "step 30 (nats)"
    for step in (5, 60):
        with pytest.raises(
            ValueError, match=f"between the first and the last snapshot, 10 to 60, got {step}"
        ):
            diagnosis.plot_before_after(step)
    with pytest.raises(ValueError, match="expected an issue with a forecast, got a diagnosis without one"):
        diagnose([snapshot(1, a={})]).plot_forecast()


@pytest.mark.parametrize("draw", [entropy_heatmap, lambda s, **more: curvature_evolution([s, s], **more)])
def test_axes_that_are_given_are_drawn_into(draw, mixed):
    figure = Figure()
    FigureCanvasAgg(figure)
    _, right = figure.subplots(1, 2)
    own = heatmap(mixed, SINK_MASS, ax=right) if draw is entropy_heatmap else draw(mixed, ax=right)
    assert own is right and right.get_title(loc="left")
    with pytest.raises(TypeError, match="expected ax to be None or matplotlib's Axes, got Figure"):
        curvature_evolution([mixed], ax=figure)


def test_a_notebook_shows_a_figure_once(mixed):
    """By IPython's rule: a value's own `_repr_png_`, and no figure of pyplot that its backend would show again."""
    axes = entropy_heatmap(mixed)
    assert axes._repr_png_().startswith(b"\x89PNG")
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="at least one layer"):
        entropy_heatmap(Snapshot(1, {}))
    for draw in (score_range_evolution, curvature_evolution):
        with pytest.raises(ValueError, match="at least one snapshot"):
            draw([])


@pytest.mark.parametrize(
    "draw", [entropy_heatmap, lambda s: score_range_evolution([s]), lambda s: curvature_evolution([s])]
)
def test_figures_are_written(draw, mixed, tmp_path):
    draw(mixed).figure.savefig(tmp_path / "figure.png")
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


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("steps", [(10,), (10, 20)])
def test_a_model_whose_scores_are_all_zero_has_a_figure_on_a_plain_scale(steps):
    history = [snapshot(step, a=dict(max_logit=0.0, min_logit=0.0)) for step in steps]
    axes = score_range_evolution(history)
    assert axes.get_yscale() == "linear" and axes.get_ylim()[0] <= 0.0 < axes.get_ylim()[1]
