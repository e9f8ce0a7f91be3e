"""What the private names of PyTorch's own attention kernels carry: the public behaviour that fails if one is wrong."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from compat_helpers import carried_by

from hnf_attention import attention, compat, instrument
from hnf_attention.engine import engines, library
from hnf_attention.engine.call import BackwardInputs, Call, check

LIBRARY_BACKWARDS = pytest.mark.parametrize(
    "engine", engines.output_backward(library.Choice())[:2], ids=["cudnn", "flash"]
)


@carried_by("cudnn_backward", "flash_backward")
@LIBRARY_BACKWARDS
def test_pytorchs_backward_takes_the_arguments_that_it_is_given(engine):
    query, key, value = (torch.empty(2, 4, 128, 64, dtype=torch.bfloat16, device="meta") for _ in range(3))
    options = dict(attn_mask=None, is_causal=True, scale=None, window_size=None, softcap=None, sinks=None)
    call = Call(query, key, value, check(query, key, value, **options))
    lse = torch.empty(2, 4, 128, device="meta")
    inputs = BackwardInputs(torch.empty_like(query), lse, lse, torch.empty_like(query), None, None)
    gradients = engine.run(call, inputs)
    assert [g.shape for g in gradients[:3]] == [x.shape for x in (query, key, value)]


@pytest.mark.gpu
@carried_by("cudnn_backward", "flash_backward")
@LIBRARY_BACKWARDS
def test_pytorchs_backward_gives_the_gradients(engine, monkeypatch):
    shape = dict(device="cuda", dtype=torch.bfloat16, requires_grad=True)
    leaves = [torch.randn(2, 4, 128, 64, **shape) for _ in range(3)]
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*leaves).sum(), leaves)
    monkeypatch.setattr(engines, "output_backward", lambda chosen: [engine])
    got = torch.autograd.grad(attention(*leaves)[0].sum(), leaves)
    for ours, theirs in zip(got, expected):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@carried_by("cudnn_enabled")
def test_who_turns_cudnn_off_gets_none_of_its_gradients():
    assert library.choice().cudnn
    with torch.backends.cudnn.flags(enabled=False):
        assert not compat.cudnn_enabled() and not library.choice().cudnn
    assert library.choice().cudnn


@carried_by("other_flash")
@pytest.mark.skipif(
    not hasattr(torch.nn.attention, "activate_flash_attention_impl"), reason="torch has no such choice"
)
def test_another_flash_attention_gives_no_gradient_of_our_output():
    class Handle:
        def remove(self):
            pass

    torch.nn.attention.register_flash_attention_impl("of this test", register_fn=Handle)
    torch.nn.attention.activate_flash_attention_impl("of this test")
    try:
        assert compat.other_flash() == "of this test" and not library.choice().flash
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    assert compat.other_flash() is None and library.choice().flash


@carried_by("loaded_flash_functions")
def test_transformers_keeps_the_flash_functions_that_it_loaded(monkeypatch):
    from transformers import modeling_flash_attention_utils as utils

    def attend(q, k, v):
        return q

    found = attend, attend, attend, None, None
    monkeypatch.setattr(utils, "_lazy_imports", lambda *_, **__: found)
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn"):
        monkeypatch.setattr(utils, name, None)
    assert compat.loaded_flash_functions() == []
    utils.lazy_import_flash_attention("flash_attention_2")  # the third may not be compiled
    assert [inspect.unwrap(function) for function in compat.loaded_flash_functions()] == [attend] * 3


@carried_by("local_window")
def test_a_pack_of_xformers_with_a_window_is_measured_with_it(monkeypatch):
    import library_standins as standins
    from flash_standins import scores_of, statistics_of

    function = {"memory_efficient_attention": standins.memory_efficient_attention}
    library = standins.put_in_place(monkeypatch, "xformers.ops", **function)
    starts = standins.SeqLenInfo.from_starts(torch.tensor([0, 7, 12]))
    mask = standins.BlockDiagonalCausalLocalAttentionMask(starts, starts, _window_size=3)
    q = torch.randn(1, 12, 2, 8)

    class Model(torch.nn.Module):
        def forward(self):
            return library.memory_efficient_attention(q, q, q, mask)

    model = Model()
    with instrument(model, strict=True) as handle:
        model()
    parts = [statistics_of(*scores_of(x, x, 8**-0.5, window=(2, 0)))["lse"] for x in (q[0, :7], q[0, 7:])]
    torch.testing.assert_close(
        handle.latest[""].rows.lse[0].double(), torch.cat(parts, 1), rtol=1e-5, atol=1e-5
    )
