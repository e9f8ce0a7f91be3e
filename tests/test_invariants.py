"""What must hold between two calls, whatever the right numbers are: an oracle that shares nothing with the reference.

On a CPU each holds for the reference and for interpreted kernels, whose tiles the option's number chooses. On a card
it holds for whatever computes the public call.
"""

from contextlib import nullcontext

import pytest
import torch
from fuzz_run import interpreted_kernels

from hnf_attention import attention, attention_stats
from hnf_attention.statistics.merge import merge_attention

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.bfloat16] if ON_GPU else [torch.float32]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # a rounding of the inputs' dtype, some times
CORE = ("lse", "entropy", "max_logit", "min_logit")
SPREADS = ("logit_var", "collision", "score_std", "log_denominator", "visible_keys")
LEVELS = ("lse", "max_logit", "min_logit", "score_mean")
QUERIES, KEYS, HEADS, WIDTH = (150, 170, 4, 64) if ON_GPU else (19, 35, 2, 8)

#: Options that shape the scores by the places of queries and keys, and those that do not.
PLACED = {
    "causal": {"is_causal": True},
    "window": {"window_size": 9},
    "causal window": {"is_causal": True, "window_size": 12},
}
ANYWHERE = {"plain": {}, "soft-cap": {"softcap": 1.5}, "sinks": {"sinks": 0.7}, "mask": {"attn_mask": True}}
OPTIONS = ANYWHERE | PLACED
RARELY = [pytest.mark.slow, pytest.mark.exhaustive]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning"),  # NumPy's, of the interpreter
]


@pytest.fixture(params=["card"] if ON_GPU else ["reference", pytest.param("kernels", marks=pytest.mark.slow)])
def engine(request):
    """What computes the calls; the interpreter takes other tiles in other tests."""
    number = len(request.node.name)
    with interpreted_kernels(number) if request.param == "kernels" else nullcontext():
        yield request.param


def tensors(dtype, batch=1, group=2, keys=KEYS):
    generator = torch.Generator().manual_seed(0)
    shapes = ((HEADS * group // 2, QUERIES), (HEADS // 2, keys), (HEADS // 2, keys))
    return [torch.randn(batch, h, n, WIDTH, generator=generator).to(DEVICE, dtype) for h, n in shapes]


def keywords(name, dtype, keys=KEYS):
    """An option's keywords for calls of `tensors`."""
    given = dict(OPTIONS[name])
    if "sinks" in given:
        given["sinks"] = torch.full((HEADS,), given["sinks"], device=DEVICE)
    if "attn_mask" in given:
        generator = torch.Generator().manual_seed(1)
        mask = torch.randn(1, 1, QUERIES, keys, generator=generator)
        mask = mask.masked_fill(torch.rand(mask.shape, generator=generator) < 0.2, -torch.inf)
        mask[..., 3, :] = -torch.inf
        given["attn_mask"] = mask.to(DEVICE, dtype)
    return given


def results(query, key, value, extended=True, d_out=None, **options):
    """Output, statistics and gradients of a call, by name."""
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    out, rows = attention(*leaves, extended=extended, **options)
    d_out = torch.cos(torch.arange(out.numel(), device=DEVICE)).view(out.shape) if d_out is None else d_out
    d_row = torch.sin(torch.arange(rows.lse.numel(), device=DEVICE)).view(rows.lse.shape)
    gradients = torch.autograd.grad(
        (out, rows.lse, rows.entropy), leaves, (d_out.to(out.dtype), d_row, d_row)
    )
    names = (*CORE, *SPREADS, "sink_mass", "score_mean") if extended else CORE
    found = {name: getattr(rows, name).detach() for name in names} | {"out": out.detach()}
    return found | {f"d_{name}": x for name, x in zip(("query", "key", "value"), gradients)}


def alike(got, wanted, tolerance, leave_out=()):
    """Results of two calls are the same numbers, up to a tolerance of their size."""
    for name, x in wanted.items():
        if name not in leave_out:
            rounding = tolerance * max(1.0, float(x.double().nan_to_num(0, 0, 0).abs().max()))
            torch.testing.assert_close(
                got[name], x, rtol=tolerance, atol=rounding, msg=lambda m, n=name: f"{n}: {m}"
            )


def equal(got, wanted, leave_out=()):
    """Results of two calls are the same bits."""
    for name, x in wanted.items():
        if name not in leave_out:
            assert torch.equal(got[name], x), f"{name} differs"


@pytest.mark.parametrize("shift", [7.5, pytest.param(-1e4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_number_added_to_all_scores_moves_their_level_alone(shift, dtype, engine):
    query, key, value = tensors(dtype)
    bias = torch.full((1, 1, QUERIES, 1), shift, device=DEVICE)
    got = results(query, key, value, attn_mask=bias)
    wanted = results(query, key, value)
    rounding = TOLERANCE[dtype] + 16 * torch.finfo(torch.float32).eps * abs(shift)
    for name in LEVELS:
        wanted[name] = wanted[name] + shift
    alike(got, wanted, rounding)


@pytest.mark.parametrize("name", ["mask", *(pytest.param(x, marks=RARELY) for x in ANYWHERE)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_the_keys_does_not_matter(name, dtype, engine):
    query, key, value = tensors(dtype)
    order = torch.randperm(KEYS, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    given = keywords(name, dtype)
    moved = dict(given)
    if "attn_mask" in given:
        moved["attn_mask"] = given["attn_mask"][..., order]
    got = results(query, key[:, :, order], value[:, :, order], **moved)
    wanted = results(query, key, value, **given)
    for gradient in ("d_key", "d_value"):
        wanted[gradient] = wanted[gradient][:, :, order]
    alike(got, wanted, 2 * TOLERANCE[dtype], ("sink_mass",))  # which belongs to the first key


@pytest.mark.parametrize("name", ["mask", pytest.param("causal window", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_or_a_head_alone_gives_the_same_bits(name, dtype, engine):
    query, key, value = tensors(dtype, batch=2)
    given = keywords(name, dtype)
    whole = results(query, key, value, **given)
    d_out = torch.cos(torch.arange(whole["out"].numel(), device=DEVICE)).view(whole["out"].shape)
    parts = [x[1:, -2:] if x.shape[1] == HEADS else x[1:, -1:] for x in (query, key, value, d_out)]
    alone = results(*parts[:3], d_out=parts[3], **given)
    part = {n: x[1:, -2:] if x.shape[1] == HEADS else x[1:, -1:] for n, x in whole.items()}
    cotangents = ("d_query", "d_key")  # those of the rows differ
    if engine == "reference":  # a library's product may add in another order
        alike(alone, part, TOLERANCE[dtype], cotangents)
    else:
        equal(alone, part, cotangents)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_keys_merge_in_any_grouping(dtype, engine):
    query, key, value = (x.detach() for x in tensors(dtype))
    edges = (0, 5, 20, KEYS)
    a, b, c = (
        attention(query, key[:, :, i:j], value[:, :, i:j], extended=True) for i, j in zip(edges, edges[1:])
    )
    out, rows = attention(query, key, value, extended=True)
    names = [*CORE, *SPREADS, "score_mean"]
    wanted = {"out": out} | {name: getattr(rows, name) for name in names}
    merges = (merge_attention([a, b, c]), merge_attention([merge_attention([a, b]), c]),
              merge_attention([a, merge_attention([c, b])]))  # fmt: skip
    for merged, merged_rows in merges:
        alike(
            {"out": merged} | {name: getattr(merged_rows, name) for name in names},
            wanted,
            2 * TOLERANCE[dtype],
        )


@pytest.mark.parametrize("name", ["causal", "causal window"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_causal_row_does_not_depend_on_what_follows(name, dtype, engine):
    query, key, value = (x.detach() for x in tensors(dtype, keys=QUERIES))
    length = QUERIES - 9
    given = keywords(name, dtype)
    out, rows = attention(query, key, value, extended=True, **given)
    for later in (1e4, torch.inf):
        changed = [x.clone() for x in (query, key, value)]
        changed[0][:, :, length:], changed[1][:, :, length:] = later, later
        changed[2][:, :, length:] = 1e4
        again, again_rows = attention(*changed, extended=True, **given)
        if later == 1e4 or engine == "reference":
            assert torch.equal(again[:, :, :length], out[:, :, :length]), later
        for stat in (*CORE, *SPREADS):
            assert torch.equal(getattr(again_rows, stat)[..., :length], getattr(rows, stat)[..., :length]), (
                stat
            )
    prefix, prefix_rows = attention(*(x[:, :, :length] for x in (query, key, value)), extended=True, **given)
    torch.testing.assert_close(prefix, out[:, :, :length], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for stat in (*CORE, *SPREADS):
        near = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
        torch.testing.assert_close(getattr(prefix_rows, stat), getattr(rows, stat)[..., :length], **near)


@pytest.mark.parametrize("name", ["plain", *(pytest.param(x, marks=RARELY) for x in ("soft-cap", "sinks"))])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_power_of_two_may_move_from_the_scale_to_the_queries(name, dtype, engine):
    """The temperature is in the scale or in the queries: the same scores, the same bits."""
    query, key, value = tensors(dtype)
    given = keywords(name, dtype)
    wanted = results(query, key, value, scale=0.5, **given)
    for factor in (4.0, 0.25):
        got = results(query * factor, key, value, scale=0.5 / factor, **given)
        got["d_query"] = got["d_query"] * factor
        equal(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_factor_of_the_values_is_a_factor_of_the_output(dtype, engine):
    query, key, value = (x.detach() for x in tensors(dtype))
    out, rows = attention(query, key, value, is_causal=True)
    larger, same_rows = attention(query, key, 8 * value, is_causal=True)
    assert torch.equal(larger, 8 * out)
    assert all(torch.equal(getattr(same_rows, name), getattr(rows, name)) for name in CORE)


@pytest.mark.parametrize("name", ["mask", pytest.param("causal", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_key_head_that_is_repeated_is_a_key_head_that_is_shared(name, dtype, engine):
    query, key, value = tensors(dtype)
    given = keywords(name, dtype)
    shared = results(query, key, value, **given)
    repeated = results(query, *(x.repeat_interleave(2, 1) for x in (key, value)), **given)
    for gradient in ("d_key", "d_value"):
        repeated[gradient] = repeated[gradient].unflatten(1, (-1, 2)).sum(2)
    alike(repeated, shared, 2 * TOLERANCE[dtype])


NOTHING = {
    "a window over everything": {"window_size": QUERIES + KEYS},
    "a mask that hides nothing": {"attn_mask": torch.ones(1, 1, 1, KEYS, dtype=torch.bool)},
    "a bias of 0": {"attn_mask": torch.zeros(QUERIES, 1)},
    "a sink of -inf": {"sinks": torch.full((HEADS,), -torch.inf)},
}


@pytest.mark.parametrize("name", NOTHING)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_option_that_changes_nothing_changes_nothing(name, dtype, engine):
    query, key, value = tensors(dtype)
    given = {n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in NOTHING[name].items()}
    alike(results(query, key, value, **given), results(query, key, value), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pack_of_one_sequence_is_that_sequence(dtype, engine):
    query, key, value = tensors(dtype, keys=QUERIES)
    seqlens = torch.tensor([0, 0, QUERIES], dtype=torch.int32, device=DEVICE)
    got = results(query, key, value, seqlens=seqlens, is_causal=True)
    alike(got, results(query, key, value, is_causal=True), TOLERANCE[dtype])


@pytest.mark.parametrize(
    "name", ["mask", *(pytest.param(x, marks=pytest.mark.slow) for x in ("sinks", "window"))]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_without_values_and_samples_of_rows_are_those_of_the_whole_call(name, dtype, engine):
    query, key, value = (x.detach() for x in tensors(dtype))
    given = keywords(name, dtype)
    rows = attention(query, key, value, extended=True, **given)[1]
    for other in (attention_stats(query, key, extended=True, **given),
                  attention_stats(query, key, extended=True, sample=(1, 0), **given)):  # fmt: skip
        for stat in (*CORE, *SPREADS, "sink_mass"):
            got = getattr(other, stat)[..., :QUERIES]
            near = {"rtol": 5e-5, "atol": 5e-5}  # other tiles
            torch.testing.assert_close(got, getattr(rows, stat), **near, msg=lambda m, n=stat: f"{n}: {m}")


@pytest.mark.parametrize("name", ["causal window", *(pytest.param(x, marks=RARELY) for x in OPTIONS)])
def test_the_size_of_the_tiles_does_not_matter(name):
    """Portable kernels, called with tiles of their own; fp32 sums of another order."""
    kernels = pytest.importorskip("hnf_attention.kernels.portable.forward")
    from hnf_attention.engine.call import check
    from hnf_attention.kernels.portable import backward
    from hnf_attention.kernels.shared.tiles import Tiles

    query, key, value = (x.detach() for x in tensors(torch.float32))
    defaults = dict.fromkeys(("attn_mask", "scale", "window_size", "softcap", "sinks")) | {"is_causal": False}
    options = check(query, key, value, **defaults | keywords(name, torch.float32))
    first: dict = {}
    for sizes in ((16, 32), (32, 64)):
        tiles = Tiles(*sizes, 4, 1)
        out, *core, more = kernels.forward(query, key, value, options, tiles, True)
        gradients = backward.backward(
            query, key, value, options, out, *core[:2], out, core[0].cos(), core[0].sin(), (tiles, tiles)
        )
        found = dict(zip(("out", *CORE), (out, *core))) | {f"more {i}": x for i, x in enumerate(more)}
        found |= {f"d_{n}": x for n, x in zip(("query", "key", "value"), gradients)}
        first = first or found
        alike(found, first, 1e-5)
