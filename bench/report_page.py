"""How large a report's page is, how fast it is made, opened and scrubbed: 126 layers of 128 heads, 1,000 log steps.

python bench/report_page.py [--layers 126] [--heads 128] [--steps 1000] [--keep page.html] [--out result.json]

The numbers of a head drift slowly, with noise of 1% of their range, as those of training runs do. Opening is measured
from the start of the navigation to the first drawn map. Scrubbing sets the slider at each animation frame. Needs
Chromium.
"""

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
from browser import CHROMIUM, Browser

from hnf_attention.report.page.build import page_of
from hnf_attention.report.page.runs import DEFAULT_METRICS, Run

_SCRUB = """
new Promise(done => {
  const slider = document.getElementById("step");
  const last = Number(slider.max);
  let frame = 0;
  const start = performance.now();
  const each = () => {
    slider.value = Math.round(last * ((frame * 7) % FRAMES) / FRAMES);
    slider.dispatchEvent(new Event("input"));
    if (++frame < FRAMES) requestAnimationFrame(each);
    else requestAnimationFrame(() => done(FRAMES / (performance.now() - start) * 1000));
  };
  requestAnimationFrame(each);
})
"""
_OPENED = "performance.getEntriesByName('drawn')[0].startTime"


def wandering(steps, heads, generator, low, high):
    """float32 (steps, heads) in [low, high]: each head has a level, a slow drift, and noise of 1% of the range."""
    level = generator.uniform(0.15, 0.7, heads).astype(np.float32)
    drift = generator.standard_normal((steps, heads), dtype=np.float32).cumsum(axis=0) * np.float32(0.003)
    noise = generator.standard_normal((steps, heads), dtype=np.float32) * np.float32(0.01)
    return np.float32(low) + np.float32(high - low) * (level + drift + noise).clip(0, 1)


def synthetic(layers, heads, steps):
    """A run with three statistics of every head, and scores that grow in one of them."""
    generator, count = np.random.default_rng(0), layers * heads
    entropy = wandering(steps, count, generator, 0.0, 1.0)
    scores = np.exp(wandering(steps, count, generator, np.log(3), np.log(300)))
    scores[steps // 2 :, count // 2] *= np.exp(np.linspace(0, 4, steps - steps // 2))
    values = {
        "logit_range_max": scores,
        "normalized_entropy": entropy,
        "required_bits": np.rint(wandering(steps, count, generator, 2, 12)),
        "nonfinite_rows": np.zeros((steps, count), np.float32),
        "sink_mass": np.broadcast_to(generator.uniform(0, 0.6, count).astype(np.float32), (steps, count)),
        "judged_rows": np.full((steps, count), 1000, np.float32),
    }
    named = {
        f"model.layers.{layer}.self_attn": (heads, {"head_dim": 128, "dtype": "bfloat16"})
        for layer in range(layers)
    }
    loss = (np.arange(steps) * 100, 10 * np.exp(-np.arange(steps) / 300) + 2)
    return Run("large run", [100 * step for step in range(steps)], named, values, scalars={"loss": loss})


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("layers", 126), ("heads", 128), ("steps", 1000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--keep", type=Path, default=Path("report_page.html"), help="where the page goes")
    parser.add_argument("--out", type=Path, help="JSON of the results")
    options = parser.parse_args()
    run = synthetic(options.layers, options.heads, options.steps)
    start = time.perf_counter()
    page = page_of([run], [run.name], None, DEFAULT_METRICS[:3])
    page.save(options.keep)
    found = {"made_s": time.perf_counter() - start, "size_mb": options.keep.stat().st_size / 1e6}
    if CHROMIUM is None:
        print("Chromium is not installed: the page was not opened")
    else:
        found |= opened(options.keep)
    for name, value in found.items():
        print(f"{name:14} {value:8.2f}")
    if options.out:
        options.out.write_text(json.dumps(found))


def opened(path):
    """Milliseconds until the first map is drawn, and frames a second of scrubbing, the better of three each."""
    browser = Browser()
    times, rates = [], []
    for _ in range(3):
        browser.look(1440)
        browser.open(path.resolve())
        times.append(browser.evaluate(_OPENED))
        rates.append(browser.evaluate(_SCRUB.replace("FRAMES", "60")))
    browser.close()
    return {"open_ms": min(times), "scrub_fps": max(rates)}


if __name__ == "__main__":
    main()
