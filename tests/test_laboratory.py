"""The laboratory of bench/validation: its runs are what they say, and its replay is what a monitor would say."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "bench" / "validation").is_dir():
    pytest.skip("the laboratory is in the checkout only", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench.validation.recipes import Recipe, ensembles, sweep  # noqa: E402
from bench.validation.record import Record, rounded  # noqa: E402
from bench.validation.runs import train  # noqa: E402
from bench.validation.single import Training  # noqa: E402

TINY = Recipe("tiny-0", 3, width=32, depth=2, heads=2, kv_heads=2, context=32, batch=4, steps=12, log_every=4)
VARIANTS = {
    "plain": {},
    "rms, rope, grouped": {"norm": "rms", "positions": "rope", "kv_heads": 1, "beta2": 0.95, "clip": 0.0},
    "muon": {"optimizer": "muon", "rate": 5e-3, "sharpness": 4.0},
    "qk-norm": {"qk_norm": True, "rate": 1e-2, "logit_scale": 8.0},
    "noise, cosine": {"label_noise": 0.1, "schedule": "cosine", "init": 2.0, "event": "bad batch", "event_step": 3},
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
