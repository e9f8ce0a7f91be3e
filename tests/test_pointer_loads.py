"""Tiles loaded by pointers, as on an A100 or an MI300: the same numbers as by descriptors."""

import pytest
import torch
from cases import Case

pytest.importorskip("triton", reason="Triton kernels need Linux")
from hnf_attention.kernels.portable import attend, backward, forward, probe
from hnf_attention.kernels.shared import tiles
from hnf_attention.kernels.shared.tiles import Tiles

TILES = Tiles(16, 16, 4, 1)
CASES = [
    pytest.param(Case(1, 2, 1, 18, 17, 24, 20, transposed=True, is_causal=True), torch.float16, id="ragged"),
    pytest.param(Case(1, 1, 2, 20, 18, 24, 16), torch.float32, id="grouped", marks=pytest.mark.slow),
    pytest.param(Case(1, 2, 1, 1, 19, 16, 16), torch.float32, id="one row", marks=pytest.mark.slow),
    pytest.param(
        Case(1, 1, 2, 20, 18, 16, 32, mask="additive", softcap=3.0),
        torch.float32,
        id="mask",
        marks=pytest.mark.slow,
    ),
]


def results(case, tensors, dtype):
    """Everything that the portable kernels return of a call."""
    options = case.options(*tensors)
    out, *rows, _ = forward.forward(*tensors[:3], options, TILES)
    found = [out, *rows, *probe.probe(*tensors[:2], options, TILES)[:4]]
    found += probe.probe(*tensors[:2], options, TILES, parts=2, sample=(1, 0))
    generator = torch.Generator(out.device).manual_seed(1)
    d_out = torch.randn(out.shape, generator=generator, device=out.device).to(dtype)
    # Of stride 0, as the gradient of a sum has.
    for cotangents in ((d_out, None, None), (d_out[..., :1].expand(out.shape), rows[0], rows[1])):
        found += backward.backward(*tensors[:3], options, out, *rows[:2], *cotangents, (TILES, TILES))[:3]
    return found


@pytest.mark.parametrize(("case", "dtype"), CASES)
def test_they_give_the_same_numbers(case, dtype, device, monkeypatch):
    q, k, v, mask, sinks = case.tensors(dtype, device)
    k = torch.stack([k, torch.zeros_like(k)], -1)[..., 0]  # an inner stride of 2
    tensors = (q, k, v, mask, sinks)
    expected = results(case, tensors, dtype)
    for module in (attend, backward):
        monkeypatch.setattr(module, "loads_by_pointers", lambda device: True)
    for got, wanted in zip(results(case, tensors, dtype), expected, strict=True):
        if wanted is not None:
            torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("capability", "hip", "expected"),
    [
        ((8, 0), None, True),
        ((8, 9), None, True),
        ((9, 0), None, False),
        ((10, 0), None, False),
        ((12, 0), None, True),
        ((9, 4), "6.2", True),
    ],
)
def test_which_cards_load_by_pointers(capability, hip, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    tiles.kind_of.cache_clear()
    assert tiles.loads_by_pointers(torch.device("cuda", 0)) is expected
    tiles.kind_of.cache_clear()


def test_rows_far_apart_are_copied_so_that_offsets_fit_32_bits():
    near = torch.empty(1, 1, 3, 2)
    assert tiles.pointable(near) is near
    far = torch.empty(1 << 26, device="meta").as_strided((1, 1, 3, 2), (1, 1, 1 << 24, 1))
    assert tiles.pointable(far).stride(2) == 2
