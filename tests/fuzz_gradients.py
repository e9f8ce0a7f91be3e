"""What gradients a fuzzed case must give: each number in fp64, and how far rounding may take it. See `fuzz_oracle`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from fuzz_oracle import LARGEST_EXPONENT, LEAST_BIAS, Expected, Oracle, bounded_exp
from torch import Tensor

LARGEST_LSE = 2.0**26  # fp32 resolves no weight beyond it: a gradient may be 0 there


class GradientOracle:
    """The expected gradients of a case's cotangents. d_x stands for the cotangent of x, and off_x for a bound of x."""

    def __init__(self, rows: Oracle):
        self.rows, self.case = rows, rows.case
        case, eps, zero = rows.case, rows.eps, torch.zeros_like(rows.lse)
        wanted = case.problem.cotangents
        self.d_out = (case.d_out if "out" in wanted else torch.zeros_like(case.d_out)).double()
        self.d_lse = case.d_lse.double() if "lse" in wanted else zero
        self.d_entropy = case.d_entropy.double() if "entropy" in wanted else zero
        out = rows.out()
        truth = torch.where(out.judged, out.truth, 0.0)
        self.delta = (self.d_out * truth).sum(-1)
        self.off_delta = (self.d_out.abs() * (out.bound + (rows.eps_in + 64 * eps) * truth.abs())).sum(-1)
        self.vague = (rows.lse.abs() > LARGEST_LSE) & ~rows.empty
        # A weight is computed again from the stored lse.
        off = rows.delta + (rows.off_lse + 16 * eps * rows.lse.nan_to_num(0, 0, 0).abs())[..., None]
        self.high, self.low = bounded_exp(rows.log_p + off), bounded_exp(rows.log_p - off)
        self.whole = self._whole_heads()
        self._scores(off)

    def _scores(self, off: Tensor) -> None:
        """The gradient of every score, before and after the soft-cap, and its bounds."""
        rows, eps = self.rows, self.rows.eps
        v = rows.v.transpose(-1, -2)
        inner = self.d_out @ v - self.delta[..., None] + self.d_lse[..., None]
        inner = inner - self.d_entropy[..., None] * (rows.known_log_p + rows.entropy[..., None])
        size = rows.known_log_p.abs() + rows.entropy[..., None]
        off_inner = (
            (v.shape[-2] + 32) * eps * (self.d_out.abs() @ v.abs())
            + self.off_delta[..., None]
            + 32 * eps * (self.delta.abs() + self.d_lse.abs())[..., None]
            + self.d_entropy.abs()[..., None] * (off + rows.off_entropy[..., None] + 32 * eps * size)
        )
        reach = inner.abs() + off_inner
        moved = (self.high - self.low + rows.smallest + 16 * eps * self.high) * reach + self.high * off_inner
        self.ds, self.off_ds = rows.p * inner, self._known(torch.where(rows.seen, moved, 0.0))
        self.d_raw = self.ds * rows.slope
        self.off_raw = self.off_ds * (rows.slope + rows.d_slope) + self.ds.abs() * rows.d_slope
        self.off_raw = self.off_raw + rows.eps_in * self.d_raw.abs() + torch.where(rows.seen, rows.flush, 0.0)

    def _known(self, bound: Tensor) -> Tensor:
        """The bound, infinite in rows whose weights fp32 does not resolve."""
        return torch.where(self.vague[..., None], torch.inf, bound) if bool(self.vague.any()) else bound

    def _whole_heads(self) -> Tensor:
        """(B, H_kv): whether all of a key head's inputs are finite. A product of 0 and NaN is NaN."""
        case = self.case
        fine = case.query.isfinite().flatten(2).all(-1)
        fine = fine.reshape(fine.shape[0], case.key.shape[1], case.group).all(-1)
        return fine & case.key.isfinite().flatten(2).all(-1) & case.value.isfinite().flatten(2).all(-1)

    def expected(self) -> dict[str, Expected]:
        """The gradients that the problem asks for, by the input's name."""
        case, scale = self.case, self.case.used_scale
        mask = case.mask is not None and case.mask.dtype != torch.bool
        choices: dict[str, tuple[bool, Callable[[], Expected]]] = {
            "query": (True, lambda: self._product(self.d_raw, self.off_raw, self.rows.k, scale, False)),
            "key": (True, lambda: self._product(self.d_raw.mT, self.off_raw.mT, self.rows.q, scale, True)),
            "value": ("out" in case.problem.cotangents, self._value),
            "sinks": (case.sinks is not None, self._sinks),
            "mask": (mask, self._mask),
        }
        return {
            name: make() for name, (there, make) in choices.items() if there and name in case.problem.learned
        }

    def _value(self) -> Expected:
        rows = self.rows
        off = self.high - self.low + rows.eps_in * self.high + rows.flush
        off = self._known(torch.where(rows.seen, off, 0.0))
        return self._product(rows.p.mT, off.mT, self.d_out, 1.0, True)

    def _product(self, weights: Tensor, off: Tensor, x: Tensor, scale: float, grouped: bool) -> Expected:
        """scale * weights @ x; grouped: summed over the query heads of a key head."""
        rows, group, size = self.rows, self.case.group, x.abs()
        terms = weights.shape[-1] * (group if grouped else 1)
        truth = weights @ x * scale
        bound = off.nan_to_num(posinf=1e300) @ size + (terms + 32) * rows.eps * (weights.abs() @ size)
        bound = bound * abs(scale)
        fine = self.whole
        if grouped and truth.shape[1]:
            truth, bound = (y.unflatten(1, (-1, group)).sum(2) for y in (truth, bound))
        elif not grouped:
            fine = fine.repeat_interleave(group, 1)
        bound = bound + 2 * rows.eps_in * truth.abs() + rows.flush
        return Expected(truth, bound, fine[..., None, None].expand(truth.shape))

    def _sinks(self) -> Expected:
        rows, eps = self.rows, self.rows.eps
        log_p = torch.where(rows.sink_p > 0, rows.sinks - rows.lse, 0.0)
        inner = -self.delta + self.d_lse - self.d_entropy * (log_p + rows.entropy)
        size = rows.lse.nan_to_num(0, 0, 0).abs() + rows.sinks.nan_to_num(0, 0, 0).abs()
        off = rows.off_lse + 32 * eps * size
        off_inner = (
            self.off_delta
            + 32 * eps * (self.delta.abs() + self.d_lse.abs())
            + self.d_entropy.abs() * (off + rows.off_entropy + 32 * eps * (log_p.abs() + rows.entropy))
        )
        moved = off.clamp(max=LARGEST_EXPONENT).expm1() * (inner.abs() + off_inner) + off_inner
        bound = rows.sink_p * (moved + 64 * eps * inner.abs()) + 1e-30
        bound = torch.where(self.vague, torch.inf, bound).sum((0, 2))
        truth = torch.where(rows.sink_p > 0, rows.sink_p * inner, 0.0).sum((0, 2))
        fine = self.whole.repeat_interleave(self.case.group, 1).all(0)
        return Expected(truth, bound + 64 * torch.finfo(self.case.sinks.dtype).eps * truth.abs(), fine)

    def _mask(self) -> Expected:
        mask = self.case.mask
        eps, flush = torch.finfo(mask.dtype).eps, torch.finfo(mask.dtype).smallest_normal
        terms = max(1, self.ds.numel() // max(1, mask.numel()))
        bound = (self.off_ds + (terms + 4) * eps * self.ds.abs() + flush).sum_to_size(mask.shape)
        truth = self.ds.sum_to_size(mask.shape)
        raised = (mask < LEAST_BIAS) & (mask != -torch.inf)  # a bias that is replaced may have any gradient
        return Expected(truth, bound + 2 * eps * truth.abs(), bool(self.whole.all()) & ~raised)
