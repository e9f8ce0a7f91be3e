"""The demo's parts, and the whole of it at a tiny size; the full size is bench/demo_seeds.py."""

import argparse
import ast
import calendar
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from torch import nn

from hnf_attention.cli.demo import Config, run_demo
from hnf_attention.cli.demo.loss import FINAL_WINDOW, falls_behind, final, first_sign
from hnf_attention.cli.demo.model import GPT, batches, held_out_loss, standard_library_text
from hnf_attention.cli.demo.outcome import judge
from hnf_attention.cli.demo.training import QUICK, Run, train
from hnf_attention.cli.demo.view import View
from hnf_attention.errors import InputError

# Breaks within a few steps.
TINY = Config(
    steps=40,
    layers=2,
    width=32,
    heads=2,
    context=32,
    batch_size=4,
    peak_learning_rate=0.1,
    warmup_steps=10,
    sharpness=64.0,
    log_every=2,
)


def falling(steps, start=5.0, end=2.0, noise=0.05, seed=0):
    """A healthy loss curve."""
    curve = end + (start - end) * np.exp(-np.arange(steps) / (steps / 3))
    return list(curve + noise * np.random.default_rng(seed).standard_normal(steps))


def run(losses, warning=None, error=None, interventions=()):
    def at(step):
        return None if step is None else SimpleNamespace(step=step)

    return Run(
        True,
        list(losses),
        at(warning),
        at(error),
        interventions=list(interventions),
        held_out_loss=final(losses),
    )


def test_a_falling_loss_shows_nothing():
    assert first_sign(falling(400)) is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_shows_at_once(value):
    losses = falling(100)
    losses[60] = value
    sign = first_sign(losses)
    assert (sign.step, sign.kind) == (61, "non-finite")


def test_a_spike_is_six_sigma_above_the_128_steps_before():
    losses = falling(300)
    window = losses[200 - 128 : 200]
    limit = np.mean(window) + 6 * np.std(window)
    losses[200] = limit - 1e-6
    assert first_sign(losses) is None
    losses[200] = limit + 1e-6
    assert (first_sign(losses).step, first_sign(losses).kind) == (201, "spike")


def test_a_stall_is_a_hundred_steps_no_lower_than_the_hundred_before():
    fall = [5.0 - 0.01 * step for step in range(250)]
    losses = fall + [fall[-1] + 0.001 * step for step in range(200)]
    sign = first_sign(losses)
    assert sign.kind == "stall"
    means = [np.mean(losses[s - 100 : s]) - np.mean(losses[s - 200 : s - 100]) for s in range(200, 451)]
    assert sign.step == 200 + int(np.argmax(np.array(means) >= 0))
    assert first_sign(losses[: sign.step - 1]) is None


def test_a_short_run_that_ends_where_it_began_made_no_progress():
    assert first_sign([3.0] * 10 + [3.1] * 30).kind == "no progress"


def test_falling_behind_is_lasting():
    reference = falling(200, noise=0.0)
    losses = list(reference)
    losses[40] += 10.0  # passes
    for step in range(100, 200):
        losses[step] += 0.3
    first = falls_behind(losses, reference, 0.1)
    # the mean over 20 steps passes 0.1 when 7 of them are 0.3 behind
    assert first == 107
    assert falls_behind(reference, reference, 0.1) is None


def test_a_kept_promise():
    untreated = run([5.0] + [3.0] * 259, warning=30, error=50)
    treated = run(falling(260, end=2.3), interventions=[(30, {})])
    outcome = judge(untreated, treated)
    assert outcome.broken_promises == []
    assert (outcome.warning_step, outcome.alarm_step, outcome.intervention_step) == (30, 50, 30)
    # From step 201 on, the window of 100 steps before no longer holds the first loss.
    assert (outcome.sign.step, outcome.sign.kind, outcome.lead) == (201, "stall", 171)
    assert outcome.treated_sign is None
    assert outcome.gap == pytest.approx(3.0 - final(treated.losses)) and outcome.gap > 0.25
    assert json.dumps(outcome.to_dict(), allow_nan=False)


def test_a_broken_loss_is_worse_than_any():
    untreated = run([5.0] * 30 + [math.nan] * 10, warning=10)
    outcome = judge(untreated, run(falling(40), interventions=[(10, {})]))
    assert (outcome.sign.kind, outcome.sign.step, outcome.gap) == ("non-finite", 31, math.inf)
    assert outcome.broken_promises == []
    assert outcome.to_dict()["untreated_final_loss"] is None


@pytest.mark.parametrize(
    ("untreated", "treated", "said"),
    [
        (run(falling(90, end=2.5)), run(falling(90)), "never warned"),
        (run(falling(90), warning=30), run(falling(90)), "never showed any trouble"),
        (
            run([5.0] + [3.0] * 259, warning=220),
            run(falling(260)),
            "at step 201, the warning came at step 220",
        ),
        (run([5.0] + [3.0] * 259, warning=30), run([5.0] + [2.9] * 259), "less than 0.25 apart"),
        (run([5.0] + [3.0] * 259, warning=30), run([math.nan] * 260), "less than 0.25 apart"),
        (run([5.0] + [3.0] * 259, warning=30), run([5.0] + [2.0] * 259), "too, at step 201 (stall)"),
    ],
)
def test_broken_promises_are_said(untreated, treated, said):
    assert any(said in broken for broken in judge(untreated, treated).broken_promises)


def test_a_loss_without_signs_of_its_own_showed_nothing_however_far_behind_it_ends():
    outcome = judge(run(falling(90, end=2.5), warning=30), run(falling(90)))
    assert outcome.gap > 0.25 and outcome.sign is None and outcome.lead is None
    assert outcome.broken_promises == ["the untreated run's loss never showed any trouble"]


def test_text_is_the_standard_library_in_name_order():
    text = bytes(standard_library_text().tolist())
    assert len(text) == 2_000_000
    places = [text.index(Path(module.__file__).read_bytes()) for module in (argparse, ast, calendar)]
    assert places == sorted(places)


def test_an_interpreter_without_sources_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(InputError, match="got 0: this Python comes without them"):
        standard_library_text()


def test_batches_are_windows_of_the_text_and_the_same_for_a_seed():
    text = torch.arange(200, dtype=torch.uint8)
    inputs, targets = next(batches(text, 8, 16, seed=3))
    assert inputs.shape == targets.shape == (8, 16)
    assert torch.equal(inputs + 1, targets)
    assert torch.equal(next(batches(text, 8, 16, seed=3))[0], inputs)
    assert not torch.equal(next(batches(text, 8, 16, seed=4))[0], inputs)


def test_the_held_out_loss_of_a_model_that_knows_nothing_is_that_of_a_guess():
    model = GPT(layers=1, width=16, heads=2, context=8, sharpness=1.0)
    nn.init.zeros_(model.head.weight)
    text = torch.arange(200, dtype=torch.uint8)
    assert held_out_loss(model, text, 8) == pytest.approx(math.log(256))


def test_the_model_is_causal_and_as_sharp_as_asked():
    torch.manual_seed(0)
    model = GPT(layers=2, width=32, heads=4, context=16, sharpness=4.0)
    assert {block.attention.scale for block in model.blocks} == {4.0 * 8**-0.5}
    x = torch.randint(256, (2, 16))
    y = x.clone()
    y[:, 10:] = 0
    with torch.no_grad():
        assert torch.allclose(model(x)[:, :10], model(y)[:, :10], atol=1e-6)
        assert not torch.allclose(model(x)[:, 10:], model(y)[:, 10:])


@pytest.mark.slow
def test_a_treated_run_is_the_untreated_one_until_it_is_treated():
    untreated, treated = (train(TINY, treated, lambda *_: None) for treated in (False, True))
    assert not untreated.interventions and treated.interventions
    first = treated.interventions[0][0]
    assert untreated.losses[:first] == treated.losses[:first]
    assert untreated.losses[first:] != treated.losses[first:]
    assert untreated.first_issue.step == treated.first_issue.step <= first
    assert [snapshot.step for snapshot in untreated.history] == list(range(2, 41, 2))

    def worst(run):
        return max(stats.max_abs_logit.max() for stats in run.last_diagnosis.stats.values())

    assert worst(treated) < worst(untreated)


def test_too_few_steps_to_judge_are_refused():
    with pytest.raises(InputError, match=f"at least {FINAL_WINDOW} steps, got 19"):
        Config(steps=19)


def test_the_demo_says_what_happened_and_leaves_it_on_disk(tmp_path):
    stream = io.StringIO()
    outcome, returned = run_demo(TINY, tmp_path / "out", Console(file=stream, width=120))
    printed = stream.getvalue()
    assert "\x1b" not in printed  # not a terminal
    assert f"step {outcome.warning_step}: EARLY WARNING" in printed
    assert "applied a rewind, learning rate x 0.1" in printed
    assert f"untreated {outcome.untreated_loss:.2f}, treated {outcome.treated_loss:.2f}" in printed
    for broken in outcome.broken_promises:
        assert broken in " ".join(printed.split())

    # A reader leaves the files that SQLite keeps beside a database.
    names = {path.name for path in (tmp_path / "out").iterdir() if not path.name.endswith(("-wal", "-shm"))}
    figures = {
        f"{run}_{what}.png"
        for run in ("treated", "untreated")
        for what in ("entropy", "score_range", "curvature")
    }
    assert names == figures | {
        *("losses.png", "diagnosis.json", "monitor.log", "report.html", "untreated.db", "treated.db")
    }
    document = json.loads((tmp_path / "out" / "diagnosis.json").read_text(), parse_constant=pytest.fail)
    assert document == json.loads(json.dumps(returned))
    assert document["outcome"] == outcome.to_dict()
    assert document["config"]["steps"] == 40
    # A rewind costs steps. The weights of both runs have 40 behind them.
    assert outcome.lost_steps > 0 and f"trained {outcome.lost_steps} steps more" in printed
    assert len(document["untreated"]["losses"]) == 40
    assert len(document["treated"]["losses"]) == 40 + outcome.lost_steps
    assert document["untreated"]["first_issue"]["step"] == outcome.warning_step
    assert document["treated"]["held_out_loss"] == outcome.treated_loss
    assert document["treated"]["interventions"][0]["step"] == outcome.intervention_step


ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(scope="module")
def breaking():
    """The untreated tiny run, and the diagnosis of its last log step."""
    seen = []
    finished = train(TINY, False, lambda run, diagnosis: seen.append(diagnosis))
    return finished, seen[-1]


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_the_live_table_fits_the_terminal(breaking, width):
    finished, diagnosis = breaking
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=True)
    view = View(console, TINY, "untreated")
    with view.live():
        view.observe(finished, diagnosis)
    lines = ESCAPES.sub("", stream.getvalue()).replace("\r", "\n").splitlines()
    text = "\n".join(lines)
    assert max(map(cell_len, lines)) <= width and "…" not in text
    assert "40/40" in text and "issues" in text and "|score|" in text
    for layer in ("0.attention", "1.attention"):
        assert any(line.startswith(f"│ {layer} ") for line in lines)


@pytest.mark.slow
def test_the_demo_draws_a_live_table_on_a_terminal(tmp_path):
    stream = io.StringIO()
    run_demo(replace(TINY, steps=20), tmp_path, Console(file=stream, width=120, force_terminal=True))
    assert "\x1b" in stream.getvalue()
    assert "20/20" in stream.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *(pytest.param(x, marks=pytest.mark.exhaustive) for x in (1, 2))])
def test_the_quick_demo_tells_the_same_story(seed):
    outcome = judge(
        *(train(replace(QUICK, seed=seed), treated, lambda *_: None) for treated in (False, True))
    )
    assert outcome.broken_promises == []
    assert outcome.lead > 100


@pytest.mark.gpu
def test_the_demo_runs_on_a_gpu(tmp_path):
    config = replace(TINY, steps=20, device="cuda")
    _, document = run_demo(config, tmp_path, Console(file=io.StringIO(), width=120))
    assert document["config"]["device"] == "cuda" and len(document["untreated"]["losses"]) == 20


def test_an_output_folder_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to"):
        run_demo(TINY, tmp_path / "file", Console(file=io.StringIO()))


@pytest.mark.slow
def test_the_monitors_log_and_the_threads_are_given_back(tmp_path, caplog):
    torch.set_num_threads(2)
    run_demo(replace(TINY, steps=20), tmp_path, Console(file=io.StringIO()))
    assert torch.get_num_threads() == 2
    assert not caplog.records  # they are in the file
    assert "blocks." in (tmp_path / "monitor.log").read_text()
