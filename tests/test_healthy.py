"""Healthy models get neither a warning nor an error, and nobody changes their weights."""

import pytest
import torch
from healthy import HEALTHY

from hnf_attention import AttentionAnalyzer, AttentionStabilityMonitor

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

QUICK = (
    "sharp sinks on the last key",
    "previous-token head",
    "key bias",
    "short sequences",
    "sharp causal sinks on two keys",
    "nn.TransformerEncoder, padded right",
)
NAMES = [pytest.param(x, marks=() if x in QUICK else pytest.mark.slow) for x in HEALTHY]


def complaints(diagnosis):
    """What the diagnosis says beyond notes."""
    return [repr(issue) for issue in diagnosis.issues if issue.severity in ("error", "warning")]


@pytest.mark.parametrize("name", NAMES)
def test_the_analyzer_finds_nothing(name):
    model, run = HEALTHY[name].build()
    model.eval()
    with AttentionAnalyzer(model) as analyzer, torch.no_grad():
        run(0)
        run(1)
        diagnosis = analyzer.diagnose()
    assert diagnosis.stats and complaints(diagnosis) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_monitor_warns_of_nothing_and_changes_nothing(name, caplog):
    model, run = HEALTHY[name].build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with AttentionStabilityMonitor(model, log_every=1, auto_intervene=True) as monitor:
        for step in range(6):
            loss = run(step)
            if loss is not None:
                loss.backward()
                model.zero_grad()
            diagnosis = monitor.on_step()
            assert diagnosis.stats and complaints(diagnosis) == []
            assert monitor.get_intervention(diagnosis) is None
        assert not monitor.applied
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_there_are_forty_of_them():
    assert len(HEALTHY) >= 40 and all(each.why for each in HEALTHY.values())
