"""NaN and inf in attention: where they came from, and what they reached."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ...names import display_name
from ...statistics.heads import HeadStats, Snapshot
from ..extent import counted
from ..heads import Heads
from ..issue import StabilityIssue, number_text
from ..origin import (
    EMPTY,
    FP16,
    MASK,
    OUTPUT,
    PRODUCT,
    SCORES,
    First,
    Origin,
    broken_heads,
    broken_inputs,
    find_first,
    find_origin,
    fp16_product,
)
from ..thresholds import threshold
from .empty_rows import mask_of
from .overflow_risk import FORMAT_ADVICE, FORMAT_CURE
from .wording import make_issue

_TRACE = "trace_non_finite(model, batch) names the operation"
_EVERY_STEP = "set log_every=1 and run again from finite weights"


def rule(history: Sequence[Snapshot], groups: Sequence[Heads]) -> Iterator[StabilityIssue]:
    """An error for the layer that was the first to show NaN or inf, and a note for all that followed."""
    if not any(broken_heads(heads.stats).any() for heads in groups):
        earlier = find_first(history[-1])
        if earlier is not None:
            yield _passing(history[-1].step, *earlier)
        return
    origin = find_origin(history)
    assert origin is not None  # the latest snapshot has some
    yield _origin_issue(history[-1].step, origin)
    bad = {
        layer: int(broken_heads(stats).sum())
        for layer, stats in history[-1].layers.items()
        if layer != origin.layer and broken_heads(stats).any()
    }
    if bad:
        yield _followers(history[-1].step, origin, bad)


def _passing(step: int, layer: str, first: First) -> StabilityIssue:
    """NaN or inf in a step before a snapshot that is finite again."""
    name, what = display_name(layer), _first_text(first)
    evidence = f"layer {name}: {what}; at step {step} everything is finite again"
    suggestion = (
        "if this step was skipped, as a gradient scaler does, nothing was lost; else look at its batch, and go back to "
        "a checkpoint if the loss has changed since"
    )
    brief = f"NaN or inf at step {first.step}, finite again at step {step} -> look at that step's batch"
    head = first.heads[0] if len(first.heads) == 1 else None
    return make_issue(
        "non_finite",
        "warning",
        (layer, head),
        float(first.step),
        "nonfinite_rows",
        evidence,
        suggestion,
        brief,
    )


def _first_text(first: First) -> str:
    """'queries and outputs of head 3 hold NaN or inf at step 37, in forward 37'."""
    names = {"query": "queries", "key": "keys", "value": "values", "out": "outputs"}
    words = [names[name] for name in first.tensors]
    what = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
    return f"{what} of{number_text(first.heads)} hold NaN or inf at step {first.step}, in forward {first.forward}"


def _origin_issue(step: int, origin: Origin) -> StabilityIssue:
    if origin.first is not None:
        return _first_issue(step, origin, origin.first)
    stats, bad = origin.stats, np.flatnonzero(broken_heads(origin.stats))
    name = display_name(origin.layer)
    seen = f"at step {origin.snapshot.step}"
    if origin.snapshot.step != step:
        seen += f", and it is still there at step {step}"
    heads = "" if len(bad) == stats.num_heads else number_text(bad.tolist())
    why, suggestion, what, cure = _explained(origin)
    evidence = f"layer {name}{heads}: {_numbers(stats)} {seen}; this layer is the first to show it; {why}"
    head = int(bad[0]) if len(bad) == 1 else None
    total = float(stats.nonfinite_rows.sum() + stats.nonfinite_out.sum()) or float(broken_inputs(stats).sum())
    brief = f"{what} -> {cure}"
    return make_issue(
        "non_finite", "error", (origin.layer, head), total, "nonfinite_rows", evidence, suggestion, brief
    )


def _first_issue(step: int, origin: Origin, first: First) -> StabilityIssue:
    """Of NaN or inf that began in a step before the first snapshot that shows it."""
    name = display_name(origin.layer)
    why, suggestion, what, cure = _explained(origin)
    now = next(layer for layer, stats in origin.snapshot.layers.items() if broken_heads(stats).any())
    there = "there" if now == origin.layer else f"in layer {display_name(now)}"
    evidence = (
        f"layer {name}: {_first_text(first)}, which no layer did before; NaN or inf is {there} at step {step} too; "
        f"{why}"
    )
    head = first.heads[0] if len(first.heads) == 1 else None
    brief = f"first at step {first.step}: {what} -> {cure}"
    return make_issue(
        "non_finite",
        "error",
        (origin.layer, head),
        float(first.step),
        "nonfinite_rows",
        evidence,
        suggestion,
        brief,
    )


def _numbers(stats: HeadStats) -> str:
    """'12 of 120 rows of scores and 56 outputs are not finite'."""
    parts = [
        (stats.nonfinite_query, "query", "queries"),
        (stats.nonfinite_key, "key", "keys"),
        (stats.nonfinite_value, "value", "values"),
        (stats.nonfinite_out, "output", "outputs"),
    ]
    said = [
        f"{number.sum():,.0f} {one if number.sum() == 1 else many}"
        for number, one, many in parts
        if number.any()
    ]
    bad = stats.nonfinite_rows.sum()
    if bad:
        total = bad + stats.rows.sum()
        said.insert(0, f"the scores of {bad:,.0f} of {total:,.0f} rows ({bad / total:.1%})")
    return f"{' and '.join([', '.join(said[:-1]), said[-1]] if len(said) > 1 else said)} are not finite"


def _explained(origin: Origin) -> tuple[str, str, str, str]:
    """Why, what to do, and both in a few words."""
    stats, name = origin.stats, display_name(origin.layer)
    fp16 = stats.dtype == "float16"
    cause = origin.cause
    if cause == EMPTY:
        rows = counted(stats.nonfinite_empty.sum(), "output")
        return (
            f"q, k and v are finite, and {rows} belong to rows whose keys are all hidden, by "
            f"{mask_of(stats.score_kind)}: a softmax over -inf only is NaN",
            "give every row a key to see, padding included, or set these rows to 0 after the softmax, as SDPA does; "
            "the weights and the learning rate are not the cause",
            "NaN from rows whose keys are all hidden",
            "give every row a key to see, or zero such rows as SDPA does",
        )
    if cause == FP16:
        seen, bound = (np.nanmax(product, initial=0.0) for product in fp16_product(stats))
        reach = f"reaches {seen:.4g}" if seen > threshold("fp16_product") else f"may reach {bound:.4g}"
        return (
            f"q, k and v are finite, and q.k before scaling {reach}, which is inf in fp16 (above 65504)",
            FORMAT_ADVICE,
            f"q.k before scaling {reach}, infinite in fp16",
            FORMAT_CURE,
        )
    if cause == PRODUCT:
        return (
            "q and k are finite and no mask is added, so q.k itself is beyond the largest fp32 number",
            "the query and key weights have exploded: go back to smaller ones (a checkpoint, a new start), lower the "
            "learning rate, clip gradients; QK-norm is the lasting fix",
            "finite q and k whose product is infinite",
            "smaller query and key weights, or QK-norm",
        )
    if cause == MASK:
        return (
            "q and k are finite, so the mask or bias that is added to the scores holds NaN or +inf",
            "look for NaN and +inf in the additive mask or position bias, and hide keys with -inf or a boolean mask",
            "NaN or inf in the mask or bias",
            "look for NaN and +inf in it",
        )
    if cause == OUTPUT:
        advice = f"; in float16, {FORMAT_ADVICE}" if fp16 else ""
        return (
            "q, k, v and the scores are finite, so it arose between the scores and the output",
            "look at what the layer adds to or multiplies with scores, weights and values (mask, bias, dropout, a sum "
            f"in a small format){advice}",
            "NaN or inf arose between finite scores and the output",
            FORMAT_CURE if fp16 else "look at its mask, bias and dropout",
        )
    if cause == SCORES:
        advice = f"; in float16, {FORMAT_ADVICE}" if fp16 else ""
        return (
            "only its scores were seen, so q, k, their product and the mask all come into question",
            f"look for NaN and inf in {name}'s q, k, mask and bias{advice}",
            "NaN or inf in the scores",
            FORMAT_CURE if fp16 else "look at its q, k, mask and bias",
        )
    return _fed(origin, name, fp16)


def _fed(origin: Origin, name: str, fp16: bool) -> tuple[str, str, str, str]:
    """For a layer whose q, k or v are not finite themselves."""
    training = getattr(origin.snapshot, "training", None)
    between = (
        "in what feeds it" if origin.before is None else f"between {display_name(origin.before)} and {name}"
    )
    half = "; in float16, try bfloat16 or float32" if fp16 else ""
    weights = f"the weights of {name}'s projections, the MLP and norm before them, and its input"
    restore = (
        ""
        if training is False
        else "; in a training run, go back to a checkpoint with finite weights, and lower the learning rate"
    )
    if not origin.known:
        return (
            f"the origin is not known at this cadence: {origin.coarse} steps lie between the last finite snapshot and "
            "this one, and one of them may have made weights NaN",
            f"{_EVERY_STEP} to see where it begins; check {weights}{half}{restore}",
            f"NaN or inf, origin not known: {origin.coarse} steps since the last finite snapshot",
            "log_every=1 from finite weights",
        )
    if origin.before is None:
        return (
            "it is the first layer to run, so its weights, the embeddings before it or the data hold NaN or inf",
            f"check that the model's weights and its input are finite{half}{restore}; {_TRACE}",
            "NaN or inf reaches the first layer",
            "check weights, embeddings and data",
        )
    culprit = _stored_in_fp16(origin)
    if culprit is not None:
        layer, product = culprit
        return (
            f"every layer before it is finite, and q.k before scaling reaches {product:.4g} in {layer}: where that is "
            "stored in fp16 (above 65504), NaN arises there",
            FORMAT_ADVICE,
            f"q.k before scaling reaches {product:.4g} in a layer before, infinite in fp16",
            FORMAT_CURE,
        )
    return (
        f"every layer before it is finite, so it arose {between}",
        f"look at {weights}{half}{restore}; {_TRACE}",
        f"NaN or inf arose {_short_between(origin)}",
        "look at its projections' weights, and the norm and MLP before",
    )


def _stored_in_fp16(origin: Origin) -> tuple[str, float] | None:
    """An earlier layer whose product passes fp16 and whose output may not have been seen, and that product."""
    for layer, stats in origin.snapshot.layers.items():
        if layer == origin.layer:
            return None
        if stats.dtype == "float16" and (
            product := np.nanmax(fp16_product(stats)[0], initial=0.0)
        ) > threshold("fp16_product"):
            return display_name(layer), float(product)
    return None


def _short_between(origin: Origin) -> str:
    before = display_name(origin.before or "")
    return f"after {before if len(before) <= 40 else '...' + before[-37:]}"


def _followers(step: int, origin: Origin, bad: dict[str, int]) -> StabilityIssue:
    names = [display_name(layer) for layer in bad]
    listed = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
    layers, heads = counted(len(bad), "layer"), counted(sum(bad.values()), "head")
    evidence = (
        f"{layers} more with NaN or inf at step {step}, {heads}: {listed}; they follow from layer "
        f"{display_name(origin.layer)}"
    )
    brief = f"NaN or inf in {layers} more, {heads} -> follows from the first"
    return make_issue(
        "non_finite",
        "note",
        ("", None),
        float(len(bad)),
        "nonfinite_rows",
        evidence,
        "mend the first; these follow from it",
        brief,
    )
