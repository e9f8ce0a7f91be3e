"""The issues of a run as stories: when each came, got worse, what was done, and whether it helped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...diagnosis.issue import SEVERITIES, number_text
from ...names import display_name
from ...run_log.reader import Event
from .fixes import code
from .limits import SHOWS

#: Issue types in words that need no explanation.
PLAIN = {
    "non_finite": "NaN or inf",
    "overflow_risk": "attention scores that grow too large",
    "entropy_collapse": "attention that narrows to few keys",
    "vanishing_gradient": "attention that passes hardly any gradient",
    "one_hot_attention": "attention to a single key",
    "dormant_attention": "attention that rests on one key",
    "empty_rows": "rows without a visible key",
}
_ORDER = {name: place for place, name in enumerate(SEVERITIES)}


@dataclass
class Story:
    """All issues of one type in one layer over a run.

    heads: their numbers, empty for an issue of the whole layer. worst: the detail of its worst issue. severity: of that
    one. open: the issues that are still there at the end, by head. moments: what is said of each step, in order.
    alarmed: the first step of that severity. gone: the step at which its last issue went, None if one is there.
    calm: the step since which it has been a note or gone, None while it is more.
    spans: the steps [from, to) in which it had an issue; the last one may have no end. done: interventions meanwhile.
    checks: what a monitor found of them later. forecasts: the first one of each head, as the log has it.
    """

    layer: str
    issue_type: str
    heads: set[int] = field(default_factory=set)
    worst: dict[str, Any] = field(default_factory=dict)
    worst_step: int = 0
    severity: str = "note"
    open: dict[int | None, str] = field(default_factory=dict)
    moments: list[dict[str, Any]] = field(default_factory=list)
    first: int = 0
    alarmed: int = 0
    gone: int | None = None
    calm: int | None = None
    done: list[dict[str, Any]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    spans: list[list[int | None]] = field(default_factory=list)
    forecasts: dict[int | None, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def now(self) -> str | None:
        """The gravest severity that is there at the end, None if there is none."""
        return min(self.open.values(), key=lambda name: _ORDER.get(name, len(_ORDER)), default=None)

    @property
    def grave(self) -> bool:
        """Whether an error or a warning is there at the end."""
        return self.now in ("error", "warning")

    @property
    def place(self) -> str:
        """'blocks.1.attention heads 0-3'."""
        heads = number_text(self.heads)
        if len(heads) > 40:
            heads = f" {len(self.heads)} heads"
        return f"{display_name(self.layer)}{heads}"

    @property
    def plain(self) -> str:
        """The type in plain words."""
        return PLAIN.get(self.issue_type, self.issue_type.replace("_", " "))

    @property
    def outcome(self) -> str:
        """Whether what was done helped, as a sentence."""
        if not self.done:
            return (
                ""
                if self.gone is None
                else f"It went at step {self.gone:,} without an intervention in the log."
            )
        last = self.done[-1]
        if self.gone is not None and self.gone > last["step"]:
            found = f"helped: the issue went at step {self.gone:,}"
        elif self.calm is not None and self.calm > last["step"]:
            found = f"helped: the issue has been a note since step {self.calm:,}"
        elif self.kept is not None:
            found = f"holds so far: kept at step {self.kept:,}, but the issue was not away for long enough to be over"
        else:
            found = "did not end it: the issue is still there"
        later = [check["text"] for check in self.checks if check["step"] > last["step"]]
        checked = f" Checked later: {later[-1]}." if later else ""
        return f"{last['action']} at step {last['step']:,} {found}.{checked}"

    @property
    def kept(self) -> int | None:
        """The step at which a monitor found that what was done last is worth keeping; None if it found otherwise."""
        later = [check for check in self.checks if self.done and check["step"] > self.done[-1]["step"]]
        return later[-1]["step"] if later and later[-1]["outcome"] == "kept" else None

    def to_dict(self, layers: Mapping[str, int]) -> dict[str, Any]:
        """As JSON types for the page. layers: name to its place in the page."""
        worst = self.worst
        return {
            "type": self.issue_type,
            "plain": self.plain,
            "place": self.place,
            "layer": layers.get(self.layer, -1),
            "heads": sorted(self.heads),
            "head": worst.get("head"),
            "severity": self.severity,
            "now": self.now,
            "first": self.first,
            "worst": self.worst_step,
            "gone": self.gone,
            "spans": self.spans,
            "moments": sorted(self.moments + self.done + self.checks, key=lambda moment: moment["step"]),
            "outcome": self.outcome,
            "headline": str(worst.get("headline") or worst.get("brief") or self.issue_type),
            "evidence": str(worst.get("evidence") or ""),
            "value": _number(worst.get("value")),
            "threshold": _number(worst.get("threshold")),
            "source": str(worst.get("source") or ""),
            "suggestion": str(worst.get("suggestion") or ""),
            "code": code(self.issue_type, str(worst.get("suggestion") or "")),
            "metric": SHOWS.get(self.issue_type),
        }


def stories(events: Sequence[Event]) -> list[Story]:
    """Of all issues in a log, errors and warnings that are there at the end first, worst first."""
    found: dict[tuple[str, str], Story] = {}
    for step, together in _by_step(event for event in events if event.kind == "issue"):
        for key, changes in _by_place(together).items():
            if key not in found:
                found[key] = Story(*key, first=step)
            _take(found[key], step, changes)
    noted = actions(events)
    for story in found.values():
        story.done = [each for each in noted if _treats(each, story)]
        names = {each["action"] for each in story.done}
        story.checks = [each for each in noted if each["kind"] == "verification" and each["action"] in names]
    return sorted(
        found.values(),
        # As the verdict: NaN or inf first.
        key=lambda story: (
            not story.grave,
            _ORDER.get(story.severity, len(_ORDER)),
            story.issue_type != "non_finite",
            story.first,
        ),
    )


def actions(events: Iterable[Event]) -> list[dict[str, Any]]:
    """Everything in a log that is no issue: step, kind, action, text."""
    return [found for found in map(_done, events) if found]


def _take(story: Story, step: int, changes: list[Event]) -> None:
    """Add what changed at one step."""
    if not story.open:
        story.spans.append([step, None])
    counts: dict[str, list[str]] = {}
    for event in changes:
        head, severity = event.detail.get("head"), str(event.detail.get("severity"))
        change = str(event.change)
        counts.setdefault(change, []).append(severity)
        if isinstance(head, int):
            story.heads.add(head)
        if change == "gone":
            story.open.pop(head, None)
        else:
            if isinstance(event.detail.get("forecast"), Mapping):
                story.forecasts.setdefault(head, event.detail["forecast"])
            story.open[head] = severity
            story.gone = None
            rank, worst = _ORDER.get(severity, len(_ORDER)), _ORDER.get(story.severity, len(_ORDER))
            graver = not story.worst or rank < worst
            if graver:
                story.severity, story.alarmed = severity, step
            if graver or rank == worst and _beyond(event.detail) >= _beyond(story.worst):
                story.worst, story.worst_step = event.detail, step
    if story.grave:
        story.calm = None
    elif story.calm is None:
        story.calm = step
    if not story.open:
        story.gone = step
        story.spans[-1][1] = step
    for change, severities in counts.items():
        gravest = min(severities, key=lambda name: _ORDER.get(name, len(_ORDER)))
        first = (
            "first sign"
            if change == "new" and step == story.first
            else {"new": "more heads"}.get(change, change)
        )
        many = f" in {len(severities)} heads" if len(severities) > 1 else ""
        text = f"{first}{many}" if change == "gone" else f"{first}: {gravest}{many}"
        story.moments.append({"step": step, "kind": change, "severity": gravest, "text": text})


def _beyond(detail: Mapping[str, Any]) -> float:
    """How far an issue is beyond its threshold, on either side."""
    value, limit = _number(detail.get("value")), _number(detail.get("threshold"))
    return math.inf if value is None or limit is None else abs(value - limit)


def _done(event: Event) -> dict[str, Any] | None:
    """Something that is no issue, as a moment of a story."""
    if event.kind == "issue":
        return None
    detail = {key: value for key, value in event.detail.items() if key not in ("kind", "step")}
    if event.kind == "thresholds" and isinstance(detail.get("values"), Mapping):
        detail = dict(detail["values"]) or {"text": "the default ones"}
    action = str(detail.pop("action", event.kind))
    layers = detail.pop("layers", None)
    named = list(layers) if isinstance(layers, (list, tuple, Mapping)) else []
    if isinstance(detail.get("layer"), str):
        named.append(detail["layer"])
    # A monitor's account: its later sentences tell what became of an intervention.
    outcome = detail.pop("outcome", "open") if event.kind == "intervention" else "open"
    checked = outcome != "open"
    text = (
        detail.pop("text", None)
        or detail.pop("description", None)
        or ", ".join(f"{key} {_short(value)}" for key, value in detail.items())
    )
    return {
        "step": event.step,
        "kind": "verification" if checked else event.kind,
        "action": action.replace("_", " "),
        "text": str(text) if checked else _deed(action.replace("_", " "), str(text)),
        "layers": [str(name) for name in named],
        "outcome": str(outcome),
    }


def _deed(action: str, text: str) -> str:
    """'qk clip (threshold 30)'; a text that begins with the action needs no other name."""
    if text.lower().startswith(action.lower()):
        return text
    return f"{action} ({text})" if text else action


def _treats(done: Mapping[str, Any], story: Story) -> bool:
    """An intervention while the story lasts, in its layer or in none that the log names."""
    if done["kind"] != "intervention" or done["step"] < story.first:
        return False
    if story.gone is not None and done["step"] >= story.gone:
        return False
    return not done["layers"] or not story.layer or story.layer in done["layers"]


def _by_step(events: Iterable[Event]) -> list[tuple[int, list[Event]]]:
    found: dict[int, list[Event]] = {}
    for event in events:
        found.setdefault(event.step, []).append(event)
    return sorted(found.items())


def _by_place(events: Iterable[Event]) -> dict[tuple[str, str], list[Event]]:
    found: dict[tuple[str, str], list[Event]] = {}
    for event in events:
        key = str(event.detail.get("layer") or ""), str(event.detail.get("issue_type"))
        found.setdefault(key, []).append(event)
    return found


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _short(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
