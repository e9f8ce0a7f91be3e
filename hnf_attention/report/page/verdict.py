"""How a run went, in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .runs import Run
from .stories import Story


class Verdict(NamedTuple):
    """status: "failed", "at risk", "recovered", "healthy" or "not judged". sentence: for everyone."""

    status: str
    sentence: str


def verdict(run: Run, told: Sequence[Story]) -> Verdict:
    """Judge by the worst story that is still open, else by the worst one that ended."""
    if not run.heads:
        return Verdict("not judged", "No attention was measured in this run, so nothing is known about it.")
    failed = [story for story in told if story.issue_type == "non_finite" and story.severity == "error"]
    open_ = [story for story in told if story.grave]
    ended = [story for story in told if not story.grave and story.severity in ("error", "warning")]
    last = f"step {run.steps[-1]:,}" if run.steps else "the end"
    if any(story.grave for story in failed):
        story = next(story for story in failed if story.grave)
        return Verdict(
            "failed",
            f"This run failed: {_began(story)}{_signs(told, story)}{_treated(story)}{_more(open_, story)}.",
        )
    if open_:
        story = min(open_, key=lambda one: one.now != "error")
        return Verdict(
            "at risk", f"This run is at risk: {_began(story)}{_treated(story)}{_more(open_, story)}."
        )
    if ended:
        story = ended[0]
        how = f"{_began(story)}{_treated(story)}{_more(ended, story)}"
        return Verdict("recovered", f"This run recovered: {how}; nothing serious was left at {last}.")
    notes = len(told)
    said = f", and {notes} place{'s are' if notes > 1 else ' is'} worth a look" if notes else ""
    heads, layers = f"{run.heads:,} heads", f"{len(run.layers)} layer{'s' * (len(run.layers) != 1)}"
    span = f"up to {last}" if run.training else f"at {last}"
    return Verdict("healthy", f"Attention is healthy {span}: nothing serious in {heads} of {layers}{said}.")


def _began(story: Story) -> str:
    where = "in the whole model" if not story.layer and not story.heads else f"in {story.place}"
    alarm = ""
    if story.alarmed > story.first and story.severity == "error":
        alarm = f" and was serious from step {story.alarmed:,}"
    return f"{story.plain} {where} began at step {story.first:,}{alarm}"


def _signs(told: Sequence[Story], story: Story) -> str:
    """Since when other issues in the same place, or in the whole model, had told of it."""
    before = [one.first for one in told if one.layer in (story.layer, "") and one.first < story.first]
    return f" after signs from step {min(before):,} on" if before else ""


def _treated(story: Story) -> str:
    """What was done about it, and since when it is over, or no more than a note."""
    how, end = ("ended it", story.gone) if story.gone is not None else ("eased it to a note", story.calm)
    if story.done:
        last = story.done[-1]
        what = f"{last['action']} at step {last['step']:,}"
        if end is None and story.kept is not None:
            return f", and {what} holds so far, kept at step {story.kept:,}"
        return f", and {what} has not ended it" if end is None else f", and {what} {how} by step {end:,}"
    if end is None:
        return ", and the log has no intervention against it"
    return f", and it {'ended' if story.gone is not None else 'eased to a note'} by step {end:,}"


def _more(stories: Sequence[Story], told: Story) -> str:
    others = sum(story is not told for story in stories)
    return f" (and {others} more issue{'s' * (others != 1)})" if others else ""
