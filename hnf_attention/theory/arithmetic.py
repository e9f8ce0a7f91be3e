"""Number formats, and how an attention kernel computes in them: what the error bounds are about."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

FP32_UNIT = 2.0**-24
# Tensor cores truncate where they add (Fasi, Higham, Mikaitis, Pranesh, PeerJ CS 2021): twice the rounding.
TENSOR_CORE_UNIT = 2.0**-23
# If Hopper's sums of 8-bit products keep 14 bits, as DeepSeek-V3's authors measured (arXiv 2412.19437, section 3.3.2).
EIGHT_BIT_TENSOR_CORE_UNIT = 2.0**-13


@dataclass(frozen=True)
class Format:
    """A binary floating-point format.

    bits: of the significand with the implicit one (bf16 8, fp16 11), so that rounding to nearest errs by
        at most `unit` = 2^-bits, relative. largest: the largest finite number. smallest: the smallest
        positive (subnormal) one; below the normal range rounding errs by half of it, absolute.
    Sources: IEEE 754; the bfloat16 format; OCP 8-bit floating point (1.0) for the two fp8 formats.
    """

    name: str
    bits: int
    largest: float
    smallest: float

    @property
    def unit(self) -> float:
        return 2.0**-self.bits

    @property
    def is_eight_bit(self) -> bool:
        return self.name.startswith("float8")


FORMATS = {
    "float32": Format("float32", 24, (2.0 - 2.0**-23) * 2.0**127, 2.0**-149),
    "bfloat16": Format("bfloat16", 8, (2.0 - 2.0**-7) * 2.0**127, 2.0**-133),
    "float16": Format("float16", 11, 65504.0, 2.0**-24),
    "float8_e4m3fn": Format("float8_e4m3fn", 4, 448.0, 2.0**-9),
    "float8_e5m2": Format("float8_e5m2", 3, 57344.0, 2.0**-16),
}
ALIASES = {
    "fp32": "float32",
    "float": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp8": "float8_e4m3fn",
    "float8_e4m3": "float8_e4m3fn",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
}


def number_format(dtype: object) -> Format:
    """The format of a dtype: a name ("bfloat16", "bf16"), or anything whose text ends in one (torch.bfloat16).

    Raises ValueError for one that is not in the table.
    """
    if isinstance(dtype, Format):
        return dtype
    name = str(dtype).rpartition(".")[2].lower()
    try:
        return FORMATS[ALIASES.get(name, name)]
    except KeyError:
        known = ", ".join([*FORMATS, *ALIASES])
        raise ValueError(f"expected a dtype among {known}, got {dtype!r}") from None


@dataclass(frozen=True)
class Arithmetic:
    """How one attention call rounds; `flash` and `eager` make the two kinds there are.

    storage: of q, k, v, the weights before the product with v, and the output.
    score_roundings: how often a score is rounded to `storage` (none where it stays in fp32).
    normalised: whether weights are rounded after they were divided by their sum (eager), or before (flash).
    block: keys per step of the online softmax; 0 where the row is taken at once.
    accumulation: relative error of one addition in the matrix products: FP32_UNIT, TENSOR_CORE_UNIT, or
        EIGHT_BIT_TENSOR_CORE_UNIT.
    output: of the result; None means storage. fp32 leaves the last rounding out.
    weight_scale: what weights are multiplied by before they are rounded, a power of two >= 1. FlashAttention 3 takes
        2^8 for 8-bit ones, so that fewer become 0.
    Raises ValueError for another weight_scale.
    """

    storage: Format
    score_roundings: int
    normalised: bool
    block: int
    accumulation: float = FP32_UNIT
    output: Format | None = None
    weight_scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.weight_scale >= 1.0 or math.frexp(self.weight_scale)[0] != 0.5:
            raise ValueError(f"expected a weight_scale that is a power of two >= 1, got {self.weight_scale}")

    @property
    def output_format(self) -> Format:
        return self.output or self.storage

    @property
    def weight_unit(self) -> float:
        """Relative rounding of the weights; none in fp32, whose weights are the softmax's own numbers."""
        return 0.0 if self.storage.name == "float32" else self.storage.unit

    @property
    def on_tensor_cores(self) -> Arithmetic:
        return replace(self, accumulation=TENSOR_CORE_UNIT)

    def blocks(self, keys: int) -> int:
        return 1 if self.block == 0 else -(-keys // self.block)


def flash(dtype: object, block: int = 64) -> Arithmetic:
    """Fused attention: fp32 scores, weights rounded before they are normalised, normaliser from unrounded ones."""
    return Arithmetic(number_format(dtype), 0, False, block)


def eight_bit_flash(dtype: object = "fp8", block: int = 64) -> Arithmetic:
    """FlashAttention 3 of 8-bit inputs on Hopper: 8-bit weights times 2^8, sums of 14 bits, an output in bf16."""
    unit, output = EIGHT_BIT_TENSOR_CORE_UNIT, FORMATS["bfloat16"]
    return replace(flash(dtype, block), accumulation=unit, output=output, weight_scale=256.0)


def eager(dtype: object) -> Arithmetic:
    """`softmax((q k^T) * scale, dtype=float32).to(dtype) v`: product and scaled scores are stored in dtype."""
    storage = number_format(dtype)
    return Arithmetic(storage, 0 if storage.name == "float32" else 2, True, 0)
