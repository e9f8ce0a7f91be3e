"""What a fuzzed case must give: each number in fp64, and how far rounding may take it.

The bounds are a forward error analysis. A score q.k of D products in fp32 is off by at most
`delta = (D + c) eps32 |q|.|k|`. Its weight is then between exp(s - delta - lse_high) and exp(s + delta - lse_low), and
every statistic and gradient is bounded by those. Nothing is fitted to what the kernels give.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from cases import oracle_scores
from fuzz_cases import FuzzCase
from torch import Tensor

LEAST_BIAS = -1e16  # a lower bias counts as this
LARGEST_EXPONENT = 300.0  # of bounds: where it is reached, everything is allowed


@dataclass
class Expected:
    """The true numbers of a result, what they may be off by, and where they are judged."""

    truth: Tensor
    bound: Tensor
    judged: Tensor


def bounded_exp(x: Tensor) -> Tensor:
    return x.clamp(max=LARGEST_EXPONENT).exp()


class Oracle:
    """The expected results of a case, by name. Attributes are fp64 on the CPU.

    ties: whether what computes the case gives equal products of equal vectors. A library's product need not.
    """

    def __init__(self, case: FuzzCase, ties: bool):
        self.case, self.ties = case, ties
        dtype = case.query.dtype
        self.eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        self.eps_in = torch.finfo(dtype).eps
        self.smallest = 1e-300 if dtype == torch.float64 else 1e-37  # below it a number may be 0
        # What a product in half precision may lose at the bottom. Cards take smaller numbers of bf16 and fp32 for 0.
        self.flush = torch.finfo(dtype).smallest_normal * (self.eps_in if dtype == torch.float16 else 1)
        q, k, v = (x.detach().double() for x in (case.query, case.key, case.value))
        broken_q, broken_k = (~x.isfinite().all(-1) for x in (q, k))
        self.v_finite = v.isfinite()
        q, k, self.v = (
            x.nan_to_num(0.0, 0.0, 0.0).repeat_interleave(n, 1)
            for x, n in zip((q, k, v), (1, case.group, case.group))
        )
        self.q, self.k = q, k
        mask = case.mask
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.double()
            mask = torch.where(mask == -torch.inf, mask, mask.clamp(min=LEAST_BIAS))
        # The same function as the other tests: scores of the grouped keys, -inf where hidden.
        grouped = case.key.detach().double().nan_to_num(0.0, 0.0, 0.0)
        self.scores, hidden = oracle_scores(replace(case, scale=case.used_scale), q, grouped, mask)
        self.seen = ~hidden
        scale = abs(case.used_scale)
        delta = (q.shape[-1] + 16) * self.eps * scale * (q.abs() @ k.abs().transpose(-1, -2))
        self.slope, self.d_slope = torch.ones_like(delta), torch.zeros_like(delta)
        if case.softcap is not None:
            raw = q @ k.transpose(-1, -2) * case.used_scale / case.softcap
            self.slope = 1 - raw.tanh().square()
            self.d_slope = (delta / case.softcap).clamp(max=1.0) + 8 * self.eps
            delta = (
                torch.minimum(delta, torch.tensor(2 * case.softcap, dtype=torch.float64))
                + 8 * self.eps * case.softcap
            )
        if mask is not None and mask.dtype != torch.bool:
            bias = torch.where(mask == -torch.inf, 0.0, mask).abs()
            delta = delta + 4 * self.eps * (bias + self._size_before(mask))
        self.delta = torch.where(self.seen, delta + 8 * self.eps, 0.0)
        self.broken = (
            self.seen & (broken_q[..., None] | broken_k.repeat_interleave(case.group, 1)[:, :, None])
        ).any(-1)
        self.keyless = ~self.seen.any(-1)
        self._weights()

    def _size_before(self, mask: Tensor) -> Tensor:
        return torch.where(self.seen, self.scores - torch.where(mask == -torch.inf, 0.0, mask), 0.0).abs()

    def _weights(self) -> None:
        case, s, delta = self.case, self.scores, self.delta
        sinks = torch.full(s.shape[:3], -torch.inf, dtype=torch.float64)
        if case.sinks is not None:
            sinks = case.sinks.double()[None, :, None].expand(s.shape[:3])
        self.sinks = sinks
        self.top = torch.where(self.keyless, -torch.inf, self._amax(s))
        peak = torch.maximum(self.top, sinks)
        self.empty = peak == -torch.inf
        # Relative to the largest element: at 1e7, the rounding of fp64 itself would show in a variance.
        self.peak = torch.where(self.empty, 0.0, peak)
        relative, sink = s - self.peak[..., None], sinks - self.peak

        def lse_of(scores: Tensor) -> Tensor:
            found = torch.cat([scores, sink[..., None]], -1).logsumexp(-1)
            return torch.where(self.empty, 0.0, found)

        lse = self.relative_lse = lse_of(relative)
        self.lse = torch.where(self.empty, -torch.inf, self.peak + lse)
        common = (
            self.ties
            and case.scores == "equal"
            and self.eps > 1e-12
            and case.sinks is None
            and (case.mask is None or case.mask.dtype == torch.bool)
        )
        spread = torch.where(self.seen, 8 * self.eps, 0.0) if common else delta
        low, high = lse_of(relative - delta), lse_of(relative + delta)
        rounding = 16 * self.eps * (1 + torch.where(self.empty, 0.0, self.lse).abs())
        self.off_lse = torch.maximum(high - lse, lse - low) + rounding
        self.spread = spread
        low, high = (lse_of(relative - spread), lse_of(relative + spread)) if common else (low, high)
        self.log_p = relative - lse[..., None]
        self.p = self.log_p.exp()
        self.p_high = bounded_exp(relative + spread - low[..., None]).clamp(max=1.0)
        self.p_low = bounded_exp(relative - spread - high[..., None])
        lost = torch.where(self.seen, self.smallest, 0.0)
        self.d_p = torch.maximum(self.p_high - self.p, self.p - self.p_low) + 8 * self.eps * self.p + lost
        self.sink_p = (sink - lse).exp()
        moved = torch.maximum(bounded_exp(sink - low) - self.sink_p, self.sink_p - bounded_exp(sink - high))
        self.d_sink_p = (
            moved + 8 * self.eps * self.sink_p + torch.where(sinks == -torch.inf, 0.0, self.smallest)
        )
        self.known_log_p = torch.where(self.seen & (self.p > 0), self.log_p, 0.0)
        self.entropy, self.off_entropy = self._entropy()

    def _entropy(self) -> tuple[Tensor, Tensor]:
        """- sum p log p, and how much the bounds of the weights let it move."""

        def term(p: Tensor) -> Tensor:
            return -torch.where(p > 0, p * p.clamp(min=1e-300).log(), 0.0)

        p, low, high = (
            torch.cat([x, y[..., None]], -1)
            for x, y in (
                (self.p, self.sink_p),
                (self.p_low, (self.sink_p - self.d_sink_p).clamp(min=0.0)),
                (self.p_high, (self.sink_p + self.d_sink_p).clamp(max=1.0)),
            )
        )
        moved = torch.maximum((term(high) - term(p)).abs(), (term(low) - term(p)).abs()) + (high - low)
        size = p.shape[-1]
        return term(p).sum(-1), moved.sum(-1) + 64 * self.eps * (1 + math.log(size))

    # Results

    def rows(self, extended: bool) -> dict[str, Expected]:
        """The row statistics, (B, H, M) each. Broken rows are judged elsewhere."""
        fine = ~self.broken
        lse = Expected(self.lse, self.off_lse, fine)
        top = self.top
        bottom = torch.where(
            self.keyless, torch.inf, -self._amax(torch.where(self.seen, -self.scores, -torch.inf))
        )
        size = 8 * self.eps * (top.nan_to_num(0, 0, 0).abs() + bottom.nan_to_num(0, 0, 0).abs())
        d_top = (
            torch.maximum(
                self._amax(self.scores + self.delta) - top, top - self._amax(self.scores - self.delta)
            ).nan_to_num(0.0)
            + size
        )
        lows = torch.where(self.seen, -self.scores, -torch.inf)
        d_bottom = (
            torch.maximum(
                self._amax(lows + self.delta) + bottom, -bottom - self._amax(lows - self.delta)
            ).nan_to_num(0.0)
            + size
        )
        found = {
            "lse": lse,
            "entropy": Expected(self.entropy, self.off_entropy, fine),
            "max_logit": Expected(top, d_top, fine),
            "min_logit": Expected(bottom, d_bottom, fine),
        }
        if extended:
            found |= {name: Expected(truth, bound, fine) for name, (truth, bound) in self._extended().items()}
        return found

    @staticmethod
    def _amax(x: Tensor) -> Tensor:
        return x.amax(-1) if x.shape[-1] else torch.full(x.shape[:-1], -torch.inf, dtype=x.dtype)

    def _extended(self) -> dict[str, tuple[Tensor, Tensor]]:
        s = torch.where(self.seen, self.scores, 0.0)
        from_peak = torch.where(self.seen, s - self.peak[..., None], 0.0)
        sink_from_peak = torch.where(self.sinks == -torch.inf, 0.0, self.sinks - self.peak)
        mean = (self.p * from_peak).sum(-1) + self.sink_p * sink_from_peak
        off, sink_off = torch.where(self.seen, from_peak - mean[..., None], 0.0), sink_from_peak - mean
        variance = (self.p * off.square()).sum(-1) + self.sink_p * sink_off.square()
        second = (self.p_high * from_peak.square()).sum(-1) + self.sink_p * sink_from_peak.square()
        d_mean = (self.d_p * off.abs() + self.p_high * self.delta).sum(-1) + self.d_sink_p * sink_off.abs()
        d_variance = (
            (self.d_p * off.square() + self.p_high * self.delta * (2 * off.abs() + self.delta)).sum(-1)
            + self.d_sink_p * sink_off.square()
            + d_mean * (d_mean + 2 * variance.sqrt())
            + 64 * self.eps * second
        )
        collision = self.p.square().sum(-1) + self.sink_p.square()
        d_collision = (
            2 * (self.d_p * self.p_high).sum(-1)
            + 2 * self.d_sink_p * (self.sink_p + self.d_sink_p)
            + 32 * self.eps
        )
        count = self.seen.sum(-1).double()
        some = count.clamp(min=1.0)
        plain = s.sum(-1) / some
        spread = torch.where(self.seen, s - plain[..., None], 0.0)
        std = (spread.square().sum(-1) / some).sqrt()
        largest = self.delta.amax(-1) if self.delta.shape[-1] else torch.zeros_like(std)
        size = s.abs().amax(-1) if s.shape[-1] else torch.zeros_like(std)
        # The mean of the tiles is rounded at its own size.
        d_std = 2 * largest + 32 * self.eps * size * (1 + count / 16).sqrt()
        has_key = ~self.keyless
        first = self.seen.int().argmax(-1, keepdim=True) if s.shape[-1] else None
        at_first = zero_like = torch.zeros_like(std)
        d_first = zero_like
        if first is not None:
            at_first = torch.where(has_key, self.p.gather(-1, first).squeeze(-1), 0.0)
            d_first = self.d_p.gather(-1, first).squeeze(-1)
        sink_mass = at_first + self.sink_p
        log_denominator = torch.where(self.keyless, 0.0, self.relative_lse + self.peak - self.top)
        weighty = torch.where(self.p_high > 1e-12, self.spread, 0.0)
        d_log = 4 * (weighty.amax(-1) if weighty.shape[-1] else zero_like) + 32 * self.eps * (
            1 + log_denominator.abs()
        )
        if self.case.sinks is not None:  # the sink may be far above the keys
            d_log = d_log + 4 * largest + 8 * self.eps * (size + self.sinks.nan_to_num(0, 0, 0).abs())
        return {
            "logit_var": (torch.where(self.keyless, 0.0, variance), d_variance + self.smallest),
            "collision": (collision, d_collision),
            "score_std": (std, d_std),
            "sink_mass": (sink_mass, d_first + self.d_sink_p + 16 * self.eps),
            "score_mean": (plain, largest + 16 * self.eps * size * (1 + count.sqrt())),
            "log_denominator": (log_denominator, d_log.nan_to_num(0.0, 0.0)),
            "visible_keys": (count, torch.zeros_like(count)),
        }

    def out(self) -> Expected:
        """The output (B, H, M, D_v)."""
        keys = self.p.shape[-1]
        finite = self.v_finite.all(2, keepdim=True).repeat_interleave(self.case.group, 1)
        v = self.v.abs()
        truth = self.p @ self.v
        rounded = self.d_p + (self.eps_in + (keys + 16) * self.eps) * self.p_high
        bound = rounded @ v + 2 * self.eps_in * truth.abs() + self.flush
        if keys:
            bound = bound + 8 * keys * self.flush * v.amax(2, keepdim=True)
        judged = (~self.broken[..., None] & finite).expand(truth.shape)
        return Expected(truth, bound, judged)
