"""The laboratory of bench/validation: its runs are what they say, and its replay is what a monitor would say."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "bench" / "validation").is_dir():
    pytest.skip("the laboratory is in the checkout only", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench.validation.finished import severities  # noqa: E402
from bench.validation.harm import harm, onset  # noqa: E402
from bench.validation.recipes import Recipe  # noqa: E402
from bench.validation.record import Record, read, record_of  # noqa: E402
from bench.validation.replay import diagnoses, judged  # noqa: E402
from bench.validation.runs import train  # noqa: E402
from bench.validation.single import Training  # noqa: E402
from hnf_attention import AttentionStabilityMonitor  # noqa: E402

RESULTS = ROOT / "bench" / "validation" / "results"
TINY = Recipe("tiny-0", 3, width=32, depth=2, heads=2, kv_heads=2, context=32, batch=4, steps=12, log_every=4)
VARIANTS = {
    "plain": {},
    "rms, rope, grouped": {"norm": "rms", "positions": "rope", "kv_heads": 1, "beta2": 0.95, "clip": 0.0},
    "muon": {"optimizer": "muon", "rate": 5e-3, "sharpness": 4.0},
    "qk-norm": {"qk_norm": True, "rate": 1e-2, "logit_scale": 8.0},
    "noise, cosine": {
        "label_noise": 0.1,
        "schedule": "cosine",
        "init": 2.0,
        "event": "bad batch",
        "event_step": 3,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_member_of_an_ensemble_trains_as_the_plain_model_does(variant):
    recipe = replace(TINY, **variant)
    others = [replace(recipe, name=f"tiny-{n}", seed=n, rate=recipe.rate * n) for n in (1, 2)]
    records = train([others[0], recipe, others[1]])
    alone = Training(recipe)
    for _ in range(recipe.steps):
        alone.advance()
    np.testing.assert_allclose(records[1].losses, alone.loss_array(), rtol=2e-3)
    if not recipe.qk_norm:
        twin = Training(recipe.twin)
        for _ in range(recipe.steps):
            twin.advance()
        np.testing.assert_allclose(records[1].twin_losses, twin.loss_array(), rtol=2e-3)
        assert np.abs(records[1].twin_losses - records[1].losses).max() > 1e-3


FAILING = replace(TINY, steps=160, sharpness=16.0, rate=5e-2, warmup=80, precision="float32")


def said(diagnosis):
    return diagnosis.step, sorted((x.layer, x.head, x.issue_type, x.severity) for x in diagnosis.issues)


@pytest.mark.slow
@pytest.mark.parametrize("log_every", [pytest.param(1, marks=pytest.mark.exhaustive), 8])
def test_a_replay_says_what_the_live_monitor_said(log_every):
    run, live = Training(FAILING), []
    with AttentionStabilityMonitor(run.model, log_every=log_every) as monitor:
        for _ in range(FAILING.steps):
            run.advance()
            diagnosis = monitor.on_step()
            live += [] if diagnosis is None else [said(diagnosis)]
        record = record_of(
            replace(FAILING, log_every=log_every), run.loss_array(), run.loss_array(), monitor.history
        )
    again = Record.from_bytes(record.to_bytes())
    assert [said(diagnosis) for diagnosis in diagnoses(again)] == live
    assert sum(bool(issues) for _, issues in live) > 3  # there was something to say
    assert len(record.to_bytes()) < 100_000
    if log_every == 1:  # a slower cadence has these readings, and what lies between in its extremes
        slow = list(again.history(8))
        assert [snapshot.step for snapshot in slow] == list(range(8, FAILING.steps + 1, 8))
        layer = next(iter(slow[0].layers))
        between = [x.layers[layer].max_logit for x in again.history() if 8 < x.step < 16]
        np.testing.assert_allclose(slow[1].layers[layer].between_max_logit, np.max(between, 0))


def test_a_cadence_that_a_record_does_not_hold_is_refused():
    record = Record(TINY, *[np.zeros(0)] * 3, (), (), np.zeros(0, int), np.zeros((0, 77, 0)))
    with pytest.raises(ValueError, match="a multiple of the run's log_every 4, got 6"):
        list(record.history(6))


def losses(run, twin):
    return Record(
        TINY, np.array(run), np.zeros(0), np.array(twin), (), (), np.zeros(0, int), np.zeros((0, 77, 0))
    )


def test_harm_is_what_a_run_loses_against_its_twin():
    twin = np.linspace(5.0, 2.0, 200)
    worse = np.where(np.arange(200) < 100, twin, twin + 0.3)
    assert harm(losses(worse, twin)) == pytest.approx(0.3)
    assert 101 <= onset(losses(worse, twin)) <= 110
    assert harm(losses(twin, twin)) == 0 and onset(losses(twin, twin)) is None
    broken = np.where(np.arange(200) < 150, twin, np.nan)
    assert harm(losses(broken, twin)) == np.inf and onset(losses(broken, twin)) == 151
    assert np.isnan(harm(losses(broken, broken)))  # it failed, and attention has no part in it
    assert harm(losses(twin + 1, [])) == 0  # QK-norm itself


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("command", ["predict", "fixes", "real_models"])
def test_the_small_version_of_an_experiment_runs(command, tmp_path):
    out = tmp_path / ("fixes.json" if command == "fixes" else "records")
    done = run_command(command, str(out), "--small")
    if command == "predict":
        assert "12 of 12 runs" in done
        judged = run_command("judge", str(out), "--misses")
        assert judged.startswith("12 runs: ") and "clean runs that fire" in judged
    elif command == "fixes":
        assert "1 failures of 1 runs" in done and "0/1" in done.partition("untreated")[2].splitlines()[0]
        (case,) = json.loads(out.read_text()).values()
        assert "QK-norm at the measured norms" in case["policies"]["W: rewind + QK-norm + rate x 0.5"]["done"]
    else:
        assert len(list(out.glob("*.png"))) == 3 and (out / "real_models.json").stat().st_size > 1_000


def run_command(name, *arguments):
    command = [sys.executable, "-m", f"bench.validation.{name}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_recorded_ordinary_runs_hear_no_alarm():
    """The rules as they are now, over runs of transformers' models at usual rates."""
    found = [judged(record) for record in read([RESULTS / "ordinary_h200.zip"])]
    assert len(found) == 20
    assert {verdict.first["warning"] for verdict in found} == {None}


@pytest.mark.slow
def test_ordinary_models_have_no_error_at_the_end_and_next_to_no_warning():
    found = [severities(record) for record in read([RESULTS / "ordinary_h200.zip"])]
    assert sum("warning" in x for x in found) <= 1 and not any("error" in x for x in found)


@pytest.mark.slow
def test_recorded_failures_are_found_in_time():
    """One ensemble of the held-out runs: rules that miss them, or warn of all, are seen here first."""
    records = [r for r in read([RESULTS / "held_out_h200.zip"]) if r.recipe.name.startswith("held-out-06")]
    found = [v for v in map(judged, records) if v.recipe.kind == "sweep"]
    harmed, clean = ([v for v in found if v.harm >= 0.1], [v for v in found if v.harm < 0.05])
    assert len(harmed) == 5 and len(clean) == 5
    assert sum(v.first["warning"] is not None and v.lead("warning") > 0 for v in harmed) == 5
    assert sum(v.first["error"] is not None for v in harmed) >= 4
    assert sum(v.first["error"] is not None for v in clean) <= 1
