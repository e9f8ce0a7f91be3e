"""Random calls of attention that PyTorch's SDPA takes, each made from a number: odd sizes, strides, masks, values.

`kinds` limits how many kernels a card compiles: calls of one kind differ in what no kernel is compiled for.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

LAYOUTS = (
    "contiguous",
    "transposed",  # (B, L, H, D) in memory
    "offset",  # the storage starts at an address that no 16 bytes divide
    "padded rows",  # rows whose stride is no multiple of 16 bytes
    "inner stride",  # every second number
    "columns",  # D varies slowest
    "one for all",  # stride 0 over batch and head
    "one row",  # stride 0 over the length
    "overlapping",  # rows that share all but one number
    "sliding",  # rows that overlap and start at multiples of 16 bytes
)
MASKS = (
    "bool",
    "hidden rows",
    "bias",
    "fp32 bias",
    "-inf rows",
    "finfo.min rows",
    "one mask for all",
    "keys",
)
VALUES = ("normal", "normal", "normal", "large", "huge", "equal", "zero", "tiny")
WIDTHS = (1, 3, 8, 16, 40, 64, 64, 80, 96, 128, 128, 160, 256)
DTYPES = (torch.float16, torch.bfloat16, torch.bfloat16, torch.float32)
HUGE = 133120.0  # as in https://github.com/pytorch/pytorch/issues/121558


@dataclass(frozen=True)
class Kind:
    """What the kernels of a call are compiled for; sizes: of (batch * heads, M, N), see `size_of`."""

    dtype: torch.dtype
    width: int  # head dimension
    group: int  # query heads of a key head
    is_causal: bool
    mask: str | None
    sizes: tuple[int, int, int]
    negative: bool  # whether the scale is

    @staticmethod
    def draw(rng: random.Random, dtypes: Sequence[torch.dtype]) -> "Kind":
        choice = rng.choice
        mask = choice((None, choice(MASKS)))
        return Kind(
            choice(dtypes),
            choice(WIDTHS),
            choice((1, 1, 2, 3)),
            mask is None and rng.random() < 0.5,
            mask,
            (choice((2, 2, 1)), choice((2, 16, 2, 1)), choice((2, 16, 2, 1))),
            rng.random() < 0.1,
        )


@dataclass
class Arguments:
    """One call: the keywords that SDPA and `attention` share, and whether GQA is asked for."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    is_causal: bool
    scale: float | None
    values: str
    text: str  # how it was made

    @property
    def group(self) -> int:
        return self.query.shape[1] // max(1, self.key.shape[1])

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    def shown(self) -> Tensor:
        """1 for the rows whose result is used, 0 for those whose keys all carry finfo.min; to be multiplied.

        SDPA gives such a row the mean of the values, and a gradient. A model masks both.
        """
        mask = self.attn_mask
        if mask is None or mask.dtype == torch.bool:
            return torch.ones((), dtype=self.query.dtype, device=self.query.device)
        return (mask > torch.finfo(mask.dtype).min).any(-1, keepdim=True).to(self.query.dtype)

    def shared(self) -> dict:
        return {"attn_mask": self.attn_mask, "is_causal": self.is_causal, "scale": self.scale}

    def sdpa(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """PyTorch's own result for these tensors."""
        return functional.scaled_dot_product_attention(
            query, key, value, **self.shared(), enable_gqa=self.group > 1
        )

    def exact(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The result in fp64, rows without a key at 0."""
        query, key, value = query.double(), key.double(), value.double()
        key, value = (x.repeat_interleave(self.group, 1) for x in (key, value))
        width = query.shape[3]
        scale = self.scale if self.scale is not None else width**-0.5 if width else 1.0
        scores = query @ key.transpose(2, 3) * scale
        hidden = torch.zeros(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        if self.is_causal:
            hidden = ~torch.ones_like(hidden).tril()
        if self.attn_mask is not None:
            if self.attn_mask.dtype == torch.bool:
                hidden = ~self.attn_mask
            else:
                scores, hidden = scores + self.attn_mask.double(), self.attn_mask == -torch.inf
        hidden = hidden.expand(scores.shape)
        empty = hidden.all(-1, keepdim=True)
        weights = scores.masked_fill(hidden & ~empty, -torch.inf).softmax(-1).masked_fill(empty, 0.0)
        return weights @ value


def size_of(kind: int, rng: random.Random, largest: int) -> int:
    """A size of a class that kernels are compiled for: 1, a multiple of 16, or any other (2)."""
    if kind == 1:
        return 1
    if kind == 16:
        return rng.choice([n for n in (16, 32, 64, 128, 192, 256) if n <= largest])
    return rng.choice([n for n in (2, 3, 7, 17, 63, 65, 100, 129, 200) if n <= largest])


def _numbers(values: str, shape: tuple[int, ...], generator: torch.Generator, is_value: bool) -> Tensor:
    if values == "equal":
        return torch.full(shape, HUGE)
    x = torch.randn(shape, generator=generator)
    if is_value:
        return x
    return x * {"normal": 1.0, "large": 30.0, "huge": 1e5, "zero": 0.0, "tiny": 1e-7}[values]


def laid_out(layout: str, shape: tuple[int, int, int, int], draw) -> Tensor:
    """draw(shape) to a tensor of numbers, in memory as `layout` says."""
    batch, heads, length, width = shape
    if layout == "transposed":
        return draw((batch, length, heads, width)).transpose(1, 2)
    if layout == "offset":
        return draw((batch * heads * length * width + 1,))[1:].view(shape)
    if layout == "padded rows":
        return draw((batch, heads, length, width + 1))[..., :width]
    if layout == "inner stride":
        return draw((batch, heads, length, 2 * width))[..., ::2]
    if layout == "columns":
        return draw((batch, heads, width, length)).transpose(2, 3)
    if layout == "one for all":
        return draw((1, 1, length, width)).expand(shape)
    if layout == "one row":
        return draw((batch, heads, 1, width)).expand(shape)
    if layout in ("overlapping", "sliding"):
        step = 1 if layout == "overlapping" else 8
        flat = draw((step * batch * heads * length + width,))
        return flat.as_strided(shape, (step * heads * length, step * length, step, 1))
    return draw(shape)


def mask_of(kind: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A mask for scores of `shape` (B, H, M, N)."""
    batch, _, queries, keys = shape
    full = torch.rand(batch, 1, queries, keys, generator=generator) > 0.4
    if kind == "bool":
        return full
    if kind == "keys":
        return full[:, :, :1]
    if kind == "one mask for all":
        return full[:1].expand(shape)
    hidden = torch.rand(batch, 1, queries, 1, generator=generator) < 0.3
    if kind == "hidden rows":
        return full & ~hidden
    bias = torch.randn(full.shape, generator=generator).to(torch.float32 if kind == "fp32 bias" else dtype)
    if kind in ("-inf rows", "finfo.min rows"):
        least = -torch.inf if kind == "-inf rows" else torch.finfo(dtype).min
        bias = bias.masked_fill(hidden | ~full, least)
    return bias


def random_call(
    seed: int,
    device: str,
    kinds: int | None = None,
    largest: int = 200,
    empty: float = 0.05,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> Arguments:
    """The call of a number.

    kinds: how many kinds the calls of all numbers have; None for any. largest: size of M and N. empty: how often a
    size is 0.
    """
    rng = random.Random(seed)
    kind = Kind.draw(rng if kinds is None else random.Random(f"kind {seed % kinds}"), dtypes)
    generator = torch.Generator().manual_seed(seed)
    if kind.sizes[0] == 1:
        batch = kv_heads = group = 1
    else:
        batch, kv_heads, group = rng.choice((1, 2, 3)), rng.choice((2, 3)), kind.group
    queries, keys = (size_of(size, rng, largest) for size in kind.sizes[1:])
    width = value_dim = kind.width
    if rng.random() < 0.03:
        width = value_dim = 257
    if rng.random() < empty:
        sizes = [batch, kv_heads, queries, keys, width, value_dim]
        sizes[rng.randrange(6)] = 0
        batch, kv_heads, queries, keys, width, value_dim = sizes
    values = rng.choice(VALUES)
    layouts = rng.choices(LAYOUTS, k=3)

    def tensor(layout: str, shape: tuple[int, int, int, int], is_value: bool = False) -> Tensor:
        def draw(size: tuple[int, ...]) -> Tensor:
            return _numbers(values, size, generator, is_value).to(device=device, dtype=kind.dtype)

        return laid_out(layout, shape, draw)

    heads = kv_heads * group
    mask = None
    if kind.mask is not None:
        mask = mask_of(kind.mask, (batch, heads, queries, keys), kind.dtype, generator).to(device)
    scale = rng.choice((None, None, 0.5))
    arguments = Arguments(
        tensor(layouts[0], (batch, heads, queries, width)),
        tensor(layouts[1], (batch, kv_heads, keys, width)),
        tensor(layouts[2], (batch, kv_heads, keys, value_dim), True),
        mask,
        kind.is_causal,
        -0.3 if kind.negative else scale,
        values,
        "",
    )
    if values == "equal" and kind.dtype == torch.float16:  # it would be infinite
        arguments.query, arguments.key, arguments.value = (
            x.clamp(-6e4, 6e4) for x in (arguments.query, arguments.key, arguments.value)
        )
    shapes = [tuple(x.shape) for x in arguments.tensors()]
    strides = [x.stride() for x in arguments.tensors()]
    arguments.text = (
        f"call {seed}: {kind.dtype}, q, k, v {shapes}, strides {strides}, layouts {layouts}, mask {kind.mask}, "
        f"is_causal {kind.is_causal}, scale {arguments.scale}, values {values}"
    )
    return arguments
