"""The figures of docs/validation.md.

    python -m bench.validation.charts VERDICTS.json FOLDER FIXES.json [...]

VERDICTS.json: of `judge --out`. FIXES.json: of `fixes`, one or several. FOLDER gets lead.svg, phases.svg and fixes.svg.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from hnf_attention.precheck import read_design
from hnf_attention.precheck.rates import harm_probability

from .fixes import RESOLVED
from .harm import CLEAN, HARMED
from .metrics import share
from .recipes import Recipe
from .replay import TIERS


def leads(verdicts: list[dict[str, Any]]) -> Figure:
    """How long before the onset of harm the first warning and the first error came."""
    figure = _figure(7, 3)
    panel = figure.subplots()
    for tier in TIERS:
        found = [v["onset"] - v["first"][tier] for v in verdicts if v["onset"] and v["first"][tier]]
        panel.hist(found, bins=np.arange(-100, 501, 25), alpha=0.6, label=f"first {tier} ({len(found)} runs)")
    panel.axvline(0.0, color="black", linewidth=0.8)
    panel.set(xlabel="steps before the onset of harm", ylabel="runs")
    panel.legend()
    return figure


def phases(verdicts: list[dict[str, Any]]) -> Figure:
    """Temperature and rate times width of every run, whether it was harmed, and where the check expects harm."""
    figure = _figure(7, 4.5)
    panel = figure.subplots()
    draw = np.random.default_rng(0)
    for label, color, chosen in (
        ("clean", "tab:blue", lambda x: x < CLEAN),
        ("between", "tab:gray", lambda x: CLEAN <= x < HARMED),
        ("harmed", "tab:red", lambda x: x >= HARMED),
    ):
        own = [v["recipe"] for v in verdicts if chosen(v["harm"]) and v["recipe"]["kind"] == "sweep"]
        heat = [1.0 / r["sharpness"] * np.exp(draw.normal(0.0, 0.06)) for r in own]
        panel.scatter(heat, [r["rate"] * r["width"] for r in own], s=14, color=color, label=label, alpha=0.7)
    heats = np.geomspace(0.1, 2.5, 60)
    for probability, style in ((0.05, "k--"), (0.5, "k-")):
        panel.plot(
            heats,
            [_boundary(heat, probability) for heat in heats],
            style,
            label=f"harm expected in {probability:.0%}",
        )
    panel.set(xscale="log", yscale="log", xlabel="temperature, 1 is usual", ylabel="rate x width")
    panel.legend(fontsize=8)
    return figure


def _boundary(temperature: float, probability: float) -> float:
    """Rate times width at which the check gives that probability, without RoPE and for a warmup of 50 steps."""
    design = read_design({"d_model": 128, "n_heads": 4, "seq_len": 128, "temperature": temperature})
    rates = np.geomspace(1e-5, 1.0, 400)
    found = [harm_probability(design, rate, 50) for rate in rates]
    return float(rates[int(np.searchsorted(found, probability))] * design.d_model)


def fixes(cases: dict[str, dict[str, Any]]) -> Figure:
    """The share of failures that each policy resolved, with Wilson's interval."""
    names = list(dict.fromkeys(name for case in cases.values() for name in case["policies"]))
    figure = _figure(8, 0.45 * len(names) + 1.2)
    panel = figure.subplots()
    for row, name in enumerate(reversed(names)):
        treated = [case for case in cases.values() if name in case["policies"]]
        resolved = share([c["policies"][name]["final"] - c["reference"] < RESOLVED for c in treated])
        low, high = resolved.interval
        panel.plot([low, high], [row, row], color="tab:gray")
        panel.plot(resolved.value, row, "o", color="tab:blue")
        panel.text(1.02, row, f"{resolved.count} of {resolved.total}", va="center", fontsize=8)
    panel.set(xlim=(0.0, 1.15), xlabel="failures resolved", yticks=range(len(names)))
    panel.set_yticklabels(list(reversed(names)), fontsize=8)
    return figure


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verdicts", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("fixes", type=Path, nargs="+")
    given = parser.parse_args()
    verdicts = [
        v for v in json.loads(given.verdicts.read_text()) if Recipe.from_dict(v["recipe"]).kind != "fault"
    ]
    given.folder.mkdir(parents=True, exist_ok=True)
    leads(verdicts).savefig(given.folder / "lead.svg")
    phases(verdicts).savefig(given.folder / "phases.svg")
    cases: dict[str, dict[str, Any]] = {}
    for path in given.fixes:
        for name, case in json.loads(path.read_text()).items():
            cases.setdefault(name, case)["policies"] |= case["policies"]
    fixes(cases).savefig(given.folder / "fixes.svg")


if __name__ == "__main__":
    main()
