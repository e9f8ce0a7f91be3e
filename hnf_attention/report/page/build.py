"""One self-contained HTML file about a run, or about two."""

from __future__ import annotations

import base64
import hashlib
import html as markup
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ...diagnosis import AttentionDiagnosis
from ...diagnosis.measured import HARMED, harm_text
from ...diagnosis.thresholds import overridden, threshold
from ...errors import InputError
from ...figures.labels import layer_labels
from ...run_log import RunLog
from ...run_log.metrics import METRICS
from ...run_log.records import plain
from ...versions import DISTRIBUTION, __version__
from .compare import comparison
from .forecasts import earliest, forecasts
from .limits import limits, worse
from .packing import Scale, pack, steady
from .runs import Run, chosen_metrics, of_diagnosis, of_log
from .scalars import for_page
from .stories import Story, actions, stories
from .verdict import Verdict, verdict

#: The page's own script, in the order of its parts.
SCRIPTS = (
    "numbers.js", "words.js", "colours.js", "heatmap.js", "charts.js", "parts.js", "planes.js", "main.js",
)  # fmt: skip
_CLASSES = {
    "failed": "failed",
    "at risk": "risk",
    "recovered": "recovered",
    "healthy": "healthy",
    "not judged": "unjudged-run",
}
_NOT_FINITE, _SINK, _DORMANT, _NOT_JUDGED = 1, 2, 4, 8  # bits of the plane of marks
#: Codes of a plane above which it is packed by `steady`.
_LARGE = 2_000_000


@dataclass(frozen=True, repr=False)
class Page:
    """A report. text: the HTML file. verdicts: (status, sentence) of each run. In a notebook it shows itself."""

    text: str
    verdicts: tuple[Verdict, ...]

    def __repr__(self) -> str:
        return f"Page({len(self.text) / 1e6:.1f} MB: {' '.join(each.sentence for each in self.verdicts)})"

    def save(self, path: str | PathLike[str]) -> None:
        """Write the file. Raises OSError."""
        Path(path).write_text(self.text, encoding="utf-8")

    def _repr_html_(self) -> str:
        # The frame keeps the page's styles apart from the notebook's, and its script away from the notebook.
        return (
            f'<iframe sandbox="allow-scripts" title="hnf-attention report" width="100%" height="900" '
            f'srcdoc="{markup.escape(self.text)}"></iframe>'
        )


def html(
    run: RunLog | AttentionDiagnosis,
    other: RunLog | AttentionDiagnosis | None = None,
    *,
    title: str | None = None,
    names: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
) -> Page:
    """A report of a run, or of two side by side: one HTML file that needs no network.

    run, other: run logs, or diagnoses, which show the log steps that they look back on.
    title: of the page. names: of the runs, in place of their files'.
    metrics: names among `hnf_attention.run_log.metrics.METRICS`; as many of the most telling ones as fit if None.
    Raises InputError for an unknown metric, a run log without a log step, or names that are not one for each run.
    """
    given = [run] if other is None else [run, other]
    sizes = [_size(each) for each in given]
    wanted = chosen_metrics(
        metrics, max(size[0] for size in sizes), max(size[1] for size in sizes), len(given)
    )
    runs = [
        of_log(each, wanted) if isinstance(each, RunLog) else of_diagnosis(each, wanted) for each in given
    ]
    return page_of(runs, _named(runs, names), title, wanted)


def _size(run: RunLog | AttentionDiagnosis) -> tuple[int, int]:
    """Log steps and heads."""
    if isinstance(run, RunLog):
        return len(run.steps), sum(run.layers.values())
    return max(len(run.history), 1), sum(stats.num_heads for stats in run.stats.values())


def _named(runs: Sequence[Run], names: Sequence[str] | None) -> list[str]:
    if names is not None:
        if len(names) != len(runs):
            raise InputError(f"expected one name for each of {len(runs)} runs, got {len(names)}")
        return list(names)
    found = [run.name for run in runs]
    return (
        found
        if len(set(found)) == len(found)
        else [f"{name} ({place})" for place, name in enumerate(found, 1)]
    )


def page_of(runs: Sequence[Run], names: Sequence[str], title: str | None, wanted: Sequence[str]) -> Page:
    """The page of one or two runs with these statistics."""
    layers = _layers(runs)
    places = {layer["name"]: place for place, layer in enumerate(layers)}
    told = [stories(run.events) for run in runs]
    verdicts = tuple(verdict(run, each) for run, each in zip(runs, told))
    planes: dict[str, str] = {}
    tables = [_aligned(run, layers) for run in runs]
    shown = [metric for metric in METRICS if metric.name in wanted]
    shown.sort(key=lambda metric: list(wanted).index(metric.name))
    judged_with = [(name, run.thresholds) for name, run in zip(names, runs)]
    described = []
    for metric in shown:
        values = [each[metric.name] for each in tables]
        numbers = any(np.isfinite(each).any() for each in values)
        if not numbers and len(shown) > 1:
            continue
        scale = Scale.of(np.concatenate([each.reshape(-1) for each in values]))
        for number, each in enumerate(values):
            codes = scale.codes(each)
            planes[f"plane-{number}-{metric.name}"] = pack(steady(codes) if codes.size > _LARGE else codes)
        described.append({
            "name": metric.name,
            "label": metric.label,
            "unit": metric.unit,
            "numbers": numbers,
            "scale": {"low": scale.low, "high": scale.high, "log": scale.log},
            "limits": limits(metric.name, judged_with),
            "worse": worse(metric.name),
        })  # fmt: skip
    described = described or [_nothing(shown[0], planes, tables)]
    report: dict[str, Any] = {
        "heads": sum(layer["heads"] for layer in layers),
        "layers": layers,
        "metrics": described,
        "runs": [_run(*each, places) for each in zip(runs, names, told, tables)],
        "comparison": comparison(runs, told, verdicts) if len(runs) > 1 else None,
    }
    for number, (run, own) in enumerate(zip(runs, tables)):
        with overridden(run.thresholds):
            planes[f"plane-{number}-marks"] = pack(_marks(own))
    heading = title or " and ".join(names)
    return Page(_filled(report, planes, verdicts, names, heading), verdicts)


def _nothing(
    metric: Any, planes: dict[str, str], tables: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, Any]:
    """A statistic for a page whose runs hold no finite number at all."""
    scale = Scale(0.0, 1.0, False)
    for number, each in enumerate(tables):
        planes[f"plane-{number}-{metric.name}"] = pack(scale.codes(each[metric.name]))
    return {
        "name": metric.name, "label": metric.label, "unit": metric.unit, "limits": [], "worse": worse(metric.name),
        "numbers": False, "scale": {"low": 0.0, "high": 1.0, "log": False},
    }  # fmt: skip


def _layers(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """All layers of all runs: name, label, heads, where its heads start, and what it is in each run."""
    heads: dict[str, int] = {}
    for run in runs:
        for name, (count, _) in run.layers.items():
            heads[name] = max(heads.get(name, 0), count)
    found, start = [], 0
    for (name, count), label in zip(heads.items(), layer_labels(heads)):
        about = [run.layers[name][1] if name in run.layers else None for run in runs]
        found.append({"name": name, "label": label, "heads": count, "start": start, "about": about})
        start += count
    return found


def _aligned(run: Run, layers: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The run's values with the heads of all runs, NaN where this run has none."""
    if [layer["name"] for layer in layers] == list(run.layers) and run.heads == sum(
        x["heads"] for x in layers
    ):
        return run.values
    columns, start = {}, 0
    for name, (count, _) in run.layers.items():
        columns[name] = slice(start, start + count)
        start += count
    found = {}
    for metric, values in run.values.items():
        table = np.full((len(values), sum(layer["heads"] for layer in layers)), np.nan, np.float32)
        for layer in layers:
            if layer["name"] in columns:
                own = values[:, columns[layer["name"]]]
                table[:, layer["start"] : layer["start"] + own.shape[1]] = own
        found[metric] = table
    return found


def _marks(values: Mapping[str, np.ndarray]) -> np.ndarray:
    """uint8 (steps, heads): bits of what a head is, beside its numbers."""
    marks = np.zeros(values["sink_mass"].shape, np.uint8)
    with np.errstate(invalid="ignore"):
        marks[values["nonfinite_rows"] > 0] |= _NOT_FINITE
        marks[values["sink_mass"] > threshold("sink_mass")] |= _SINK
        marks[values["sink_mass"] > threshold("dormant_sink")] |= _DORMANT
        marks[values["judged_rows"] == 0] |= _NOT_JUDGED
    return marks


def _run(
    run: Run, name: str, told: Sequence[Story], values: Mapping[str, np.ndarray], places: Mapping[str, int]
) -> dict[str, Any]:
    """What the page says of one run, as JSON types."""
    return {
        "name": name,
        "steps": run.steps,
        "heads": run.heads,
        "layers": len(run.layers),
        "joined": run.joined,
        "notJudged": int((values["judged_rows"][-1] == 0).sum()),
        "stories": [_story(story, run, places) for story in told],
        "actions": actions(run.events),
        "scalars": for_page(run.scalars),
        "notMeasured": run.not_measured,
        "sessions": run.sessions,
    }


def _story(story: Story, run: Run, places: Mapping[str, int]) -> dict[str, Any]:
    """A story with its forecasts, and how often such issues meant harm: that was counted of models in training."""
    foretold = forecasts(story, run)
    harm = harm_text(story.severity, story.issue_type) if run.training else ""
    return story.to_dict(places) | {
        "forecasts": foretold,
        "forecast": earliest(foretold),
        "measured": f"{harm[0].upper()}{harm[1:]}. Source: {HARMED[story.severity].source}." if harm else "",
    }


def _filled(
    report: Mapping[str, Any],
    planes: Mapping[str, str],
    verdicts: Sequence[Verdict],
    names: Sequence[str],
    title: str,
) -> str:
    """The page's text. Everything that comes from a run is escaped."""
    style = _part("uPlot.min.css") + _part("app.css")
    own = "\n".join(_part(name) for name in SCRIPTS)
    script = f'{_part("uPlot.iife.min.js")}\n(() => {{\n"use strict";\n{own}\n}})();\n'
    many = len(names) > 1

    def each(kind: str) -> str:
        found = []
        for number, name in enumerate(names):
            heading = f"<h3>{_escaped(name)}</h3>" if many else ""
            found.append(f'<div>{heading}<div id="{kind}-{number}"></div></div>')
        return "".join(found)

    values = {
        "title": _escaped(title),
        "style": style,
        "style-hash": _hash(style),
        "script": script,
        "script-hash": _hash(script),
        "report": _json(report),
        "planes": "\n".join(
            f'<script type="text/plain" id="{name}">{text}</script>' for name, text in planes.items()
        ),
        "verdicts": "\n".join(_verdict(*pair, many) for pair in zip(verdicts, names)),
        "issues": each("issues"),
        "coverage": each("coverage"),
        "environment": each("environment"),
        "views": _views(names) if many else "",
        "comparison": _COMPARISON if many else "",
        "footer": f"Made by {DISTRIBUTION} {__version__}. Charts: uPlot 1.6.32, MIT. Nothing is loaded from a network.",
    }
    page = _part("page.html").replace('class="runs"', 'class="runs two"' if many else 'class="runs"')
    return re.sub(r"\{\{([a-z-]+)\}\}", lambda found: values[found[1]], page)


_COMPARISON = (
    '<section aria-labelledby="comparison-title"><h2 id="comparison-title">Differences</h2>'
    '<div id="comparison"></div></section>'
)


def _views(names: Sequence[str]) -> str:
    options = [("0", names[0]), ("1", names[1]), ("difference", "difference")]
    radios = "".join(
        f'<label><input type="radio" name="view" value="{value}"> {_escaped(text)}</label>'
        for value, text in options
    )
    return f'<fieldset aria-label="Run on the map">{radios}</fieldset>'


def _verdict(found: Verdict, name: str, many: bool) -> str:
    run = f'<p class="run">{_escaped(name)}</p>' if many else ""
    return (
        f'<div class="verdict {_CLASSES[found.status]}">{run}<span class="status">{found.status}</span>'
        f'<p class="sentence">{_escaped(found.sentence)}</p></div>'
    )


def _escaped(text: str) -> str:
    """Text as HTML; what UTF-8 cannot hold becomes a question mark."""
    return markup.escape(text.encode("utf-8", "replace").decode())


def _json(value: Any) -> str:
    """JSON that no HTML parser can leave: a name may hold '</script>' or '<!--'."""
    text = json.dumps(plain(value), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
