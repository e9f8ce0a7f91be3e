"""Head statistics with chosen numbers, and a stand-in for an instrumentation."""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import torch

from hnf_attention import attention_stats
from hnf_attention.diagnosis import diagnose
from hnf_attention.diagnosis.issue import HEADLINE_LENGTH, SEVERITIES
from hnf_attention.diagnosis.thresholds import THRESHOLDS
from hnf_attention.engine import fold
from hnf_attention.engine.call import check
from hnf_attention.instrumentation import Coverage, Measurement
from hnf_attention.monitoring.extremes import with_steps
from hnf_attention.statistics.fields import ERROR_FIELDS, MAX_FIELDS, NUM_SUMS, SUM_FIELDS
from hnf_attention.statistics.heads import HeadStats, Snapshot

# A healthy head: spread attention, small scores.
HEALTHY = dict(
    rows=1000.0,
    judged_rows=1000.0,
    left_out_rows=0.0,
    empty_rows=0.0,
    nonfinite_rows=0.0,
    nonfinite_query=0.0,
    nonfinite_key=0.0,
    nonfinite_value=0.0,
    nonfinite_out=0.0,
    nonfinite_empty=0.0,
    entropy=3.0,
    logit_range=6.0,
    normalized_entropy=0.7,
    max_weight=0.2,
    sink_mass=0.05,
    rest_normalized_entropy=0.7,
    jacobian_trace_bound=0.9,
    saturated_share=0.0,
    stray_share=None,  # of all rows; as `saturated_share` if it is not given
    max_logit=5.0,
    min_logit=None,  # as far down as `max_logit` is up, if it is not given
    query_norm=10.0,
    key_norm=10.0,
    query_size=1.0,  # scale * |q| of the longest
    key_size=5.0,
    num_keys=128.0,
    score_kind=0.0,
)


def head_stats(heads=4, head_dim=64, dtype="float32", sample_period=1, **numbers):
    """HeadStats of `heads` heads: HEALTHY, but for `numbers` (a number, or one per head)."""
    given = {**HEALTHY, **numbers}
    if given["stray_share"] is None:
        given["stray_share"] = given["saturated_share"]
    if given["min_logit"] is None:
        given["min_logit"] = -np.abs(given["max_logit"])
    columns = {k: np.broadcast_to(np.float64(v), heads) for k, v in given.items()}
    values = with_steps(fold.new_accumulator(heads, torch.device("cpu"))[0].numpy())
    rows, judged = columns["rows"], columns["judged_rows"]
    columns["saturated_rows"], columns["stray_rows"] = columns["saturated_share"], columns["stray_share"]
    columns["rest_entropy"] = columns["rest_normalized_entropy"] * (1 - columns["sink_mass"])
    # Ten blocks whose means differ by a standard deviation of 0.1 of their mean.
    columns["judged_blocks"] = np.full(heads, 10.0)
    for name in ERROR_FIELDS:
        columns[f"{name}_blocks"] = columns[name] ** 2 * (1 + 0.1**2 * 9 / 10)
    columns["sequences"] = np.ones(heads)
    columns |= {f"{name}_square": columns[f"{name}_norm"] ** 2 for name in ("query", "key")}
    once = [name for name in SUM_FIELDS if name.startswith("nonfinite")]
    once += ["rows", "judged_rows", "judged_blocks", "left_out_rows", "empty_rows"]
    once += ["sequences", "query_square", "key_square"]
    for index, name in enumerate(SUM_FIELDS):
        count = {**dict.fromkeys(once, 1.0), "entropy": rows, "logit_range": rows}
        values[index] = columns[name] * count.get(name, judged)
    bins = (columns["normalized_entropy"] * 32).clip(0, 31).astype(int)
    values[len(SUM_FIELDS) + bins, np.arange(heads)] = judged
    maxima = {
        **columns,
        "neg_min_logit": -columns["min_logit"],
        "logit_range": columns["max_logit"] - columns["min_logit"],
        "neg_normalized_entropy": -columns["normalized_entropy"],
        "neg_max_weight": -columns["max_weight"],
        "query_square": columns["query_size"] ** 2,
        "key_square": columns["key_size"] ** 2,
    }
    for index, name in enumerate(MAX_FIELDS):
        values[NUM_SUMS + index] = maxima[name]
    return HeadStats(values, head_dim, dtype, sample_period)


def snapshot(step=1, **layers):
    """A snapshot of layers given as HeadStats or as keywords of `head_stats`."""
    made = {
        name: value if isinstance(value, HeadStats) else head_stats(**value) for name, value in layers.items()
    }
    return Snapshot(step, made)


def finished(step=1, **layers):
    """As `snapshot`, of a model that does not train."""
    return replace(snapshot(step, **layers), training=False)


def found(history, issue_type):
    """{head: issue} of one kind, after checks that hold for every issue."""
    diagnosis = diagnose(history)
    keys = [(i.layer, i.head, i.issue_type) for i in diagnosis.issues]
    assert len(keys) == len(set(keys))
    for issue in diagnosis.issues:
        assert issue.severity in SEVERITIES
        assert issue.source and issue.suggestion
        assert f"step {history[-1].step}" in issue.evidence
        assert issue.threshold in {t.value for t in THRESHOLDS.values()}
        assert len(issue.headline) <= HEADLINE_LENGTH and " -> " in issue.headline
    return {i.head: i for i in diagnosis.issues if i.issue_type == issue_type}


def growing(scores, steps=None, **numbers):
    """History of layer `a`, whose largest score takes these values (each a number or one per head), every 10 steps."""
    steps = range(10, 10 * len(scores) + 1, 10) if steps is None else steps
    each = [
        {k: v[t] if isinstance(v, list) and len(v) == len(scores) else v for k, v in numbers.items()}
        for t in range(len(scores))
    ]
    return [snapshot(s, a={"max_logit": m, **e}) for s, m, e in zip(steps, scores, each)]


def only(head, **numbers):
    """Those numbers for one head of four, healthy ones for the others."""
    healthy = head_stats()
    return {k: np.where(np.arange(4) == head, v, getattr(healthy, k)) for k, v in numbers.items()}


def diagnoses():
    """Of steps 10, 20 and 30: the second has the issues of the first, the third has none."""
    spread, sharp = dict(normalized_entropy=[0.5, 0.6, 0.7, 0.9]), dict(max_logit=2e3)
    layers = [{"h.0.attn": spread, "h.1.attn": sharp}] * 2 + [{"h.0.attn": spread, "h.1.attn": {}}]
    return [diagnose([snapshot(10 * (i + 1), **each)]) for i, each in enumerate(layers)]


def checked(query, key, **options):
    """Validated `Options` of a call without a value."""
    default = dict(attn_mask=None, is_causal=False, scale=None, window_size=None, softcap=None, sinks=None)
    return check(query, key, None, **default | options)


@dataclass(eq=False)
class FakeForward:
    """What a recorder needs of a forward."""

    number: int = 1
    training: bool = True
    failed: bool | None = None
    ends: bool = True


def folded(*calls):
    """The values of a recorder's statistics after these calls, (query, key) each."""
    accumulator = fold.new_accumulator(calls[0][0].shape[1], torch.device("cpu"))
    for query, key in calls:
        fold.fold(accumulator, query, key, attention_stats(query, key), checked(query, key))
    return with_steps(fold.collect([accumulator]).numpy())


class FakeInstrumentation:
    """What a recorder needs of an instrumentation."""

    def __init__(self):
        self.measuring = True
        self.on_measure = self.on_forward_begin = self.on_forward_end = None
        self.sample = None
        self.numbers = itertools.count(1)
        self.coverage = Coverage({}, {"h.0.attn": "never ran"})

    def require_measured(self):
        if not self.coverage.measured:
            raise RuntimeError(str(self.coverage))

    def run(self, layer, query, key, forward=None, call=0, **options):
        """One attention call of that layer, measured if it should be."""
        if not self.measuring:
            return
        rows = attention_stats(query, key, **options)
        self.coverage.measured[layer] = "probe"
        inputs = query, key, checked(query, key, **options)
        measured = Measurement(layer, rows.detach(), query.shape[3], query.dtype, 1, *inputs)
        measured.forward, measured.call = forward, call
        self.on_measure(measured)

    def forward(self, calls, training=True, failed=False):
        """A forward of the model with these calls, each (layer, query, key) or (layer, query, key, call)."""
        if not self.measuring:
            return
        forward = FakeForward(next(self.numbers), training)
        for layer, query, key, *call in calls:
            self.run(layer, query, key, forward, *call)
        forward.failed = failed
        self.on_forward_end(forward)


def queries_and_keys(heads=2, rows=20, head_dim=8, batch=1, seed=0, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shape = batch, heads, rows, head_dim
    return [(scale * torch.randn(shape, generator=generator)).to(dtype) for _ in range(2)]
