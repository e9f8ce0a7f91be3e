"""GroupedQueryAttention against the attention classes of transformers whose parameters it has."""

import importlib

import pytest
import torch

from hnf_attention.nn import GroupedQueryAttention, QKNorm, Rope

transformers = pytest.importorskip("transformers")
B, M, E, H, H_KV, D = 2, 9, 24, 6, 2, 8
SIZES = {"hidden_size": E, "num_attention_heads": H, "num_key_value_heads": H_KV, "head_dim": D}
THEIRS = {  # family: of the module, its config, ours
    "Llama": ("llama", {}, {}),
    "Llama with biases": ("llama", {"attention_bias": True}, {"bias": True}),
    "Mistral": ("mistral", {"sliding_window": 3}, {"window_size": 3}),
    "Qwen2": ("qwen2", {}, {"bias": True, "out_bias": False}),
    "Qwen3": ("qwen3", {}, {"qk_norm": QKNorm()}),
    "Gemma": ("gemma", {}, {}),
    "Gemma2": (
        "gemma2",
        {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 5, "sliding_window": 4},
        {"softcap": 2.0, "scale": 5**-0.5, "window_size": 4},
    ),
    "Gemma3": (
        "gemma3",
        {"query_pre_attn_scalar": 7, "sliding_window": 4},
        {"qk_norm": QKNorm(unit_offset=True), "scale": 7**-0.5, "window_size": 4},
    ),
    "GptOss": (
        "gpt_oss",
        {"sliding_window": 3, "attention_bias": True},
        {"bias": True, "sinks": True, "window_size": 3},
    ),
}
CLASSES = {"gpt_oss": "GptOss"}


def pair(family):
    """Theirs, ours with its weights, the input, their arguments and the mask of ours."""
    name, config, options = THEIRS[family]
    prefix = CLASSES.get(name, name.capitalize())
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    kind = f"{prefix}TextConfig" if name == "gemma3" else f"{prefix}Config"
    made = getattr(transformers, kind)(**SIZES, **config, attn_implementation="eager")
    torch.manual_seed(0)
    theirs = getattr(module, f"{prefix}Attention")(made, layer_idx=0)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = GroupedQueryAttention(E, H, H_KV, head_dim=D, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def of_theirs(theirs, x, window):
    angles = torch.arange(M)[:, None].double() * 10000.0 ** (-torch.arange(0, D, 2).double() / D)
    if "GptOss" not in type(theirs).__name__:
        angles = torch.cat([angles, angles], -1)
    tables = angles.cos()[None], angles.sin()[None]
    behind = torch.arange(M)[:, None] - torch.arange(M)
    seen = (behind >= 0) & (behind < (window or M))
    mask = torch.zeros(1, 1, M, M, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float32).min)
    return theirs(x, position_embeddings=tables, attention_mask=mask)[0], tables


def near(found, wanted):
    """To the precision of fp32, in which theirs computes the softmax and the norms."""
    return (found - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize(
    "family",
    [pytest.param(x, marks=[] if x in ("Qwen3", "Gemma2", "GptOss") else pytest.mark.slow) for x in THEIRS],
)
def test_it_computes_what_theirs_computes_with_the_same_state_dict(family):
    theirs, ours = pair(family)
    theirs, ours = theirs.double(), ours.double()
    x = torch.randn(B, M, E, dtype=torch.float64, requires_grad=True)
    expected, tables = of_theirs(theirs, x, ours.window_size)
    parameters, names = list(theirs.parameters()), dict(theirs.named_parameters())
    wanted = torch.autograd.grad(expected.square().sum(), [x, *parameters])
    for out in (ours(x), ours(x, rotary_tables=tables), ours(x, positions=torch.arange(M).expand(B, M))):
        assert near(out, expected)
    mine = dict(ours.named_parameters())
    found = torch.autograd.grad(out.square().sum(), [x, *(mine[name] for name in names)])
    assert all(map(near, found, wanted))
    theirs.load_state_dict(ours.state_dict())
    assert ours.row_stats.lse.shape == (B, H, M)


def test_a_mask_combines_with_the_window_and_hides_padding():
    ours = GroupedQueryAttention(E, H, H_KV, head_dim=D, window_size=4)
    x = torch.randn(B, M, E)
    kept = torch.ones(B, M, dtype=torch.bool)
    kept[0, -3:] = False
    out = ours(x, kept[:, None, None])
    changed = x.clone()
    changed[0, -3:] += 1
    torch.testing.assert_close(ours(changed, kept[:, None, None])[0, :-3], out[0, :-3])
    torch.testing.assert_close(out[1], ours(x)[1])
    assert not torch.equal(ours(x, is_causal=False), ours(x))


def test_positions_only_differ_by_what_lies_between():
    ours, x = GroupedQueryAttention(E, H, head_dim=4), torch.randn(B, M, E)
    torch.testing.assert_close(ours(x, positions=torch.arange(M) + 5), ours(x))
    assert not torch.allclose(ours(x, positions=2 * torch.arange(M)), ours(x))
    some = GroupedQueryAttention(E, H, head_dim=4, rope=Rope(dim=2))
    none = GroupedQueryAttention(E, H, head_dim=4, rope=None)
    for other in (some, none):
        other.load_state_dict(ours.state_dict())
    assert not torch.allclose(some(x), ours(x)) and not torch.allclose(none(x), some(x))


@pytest.mark.slow
def test_dropout_works_with_every_option():
    torch.manual_seed(0)
    ours = GroupedQueryAttention(E, H, H_KV, head_dim=D, softcap=3.0, sinks=True, window_size=4, dropout=0.5)
    x = torch.randn(B, M, E)
    exact = ours.eval()(x)
    rows, ours = ours.row_stats, ours.train()
    mean = torch.stack([ours(x) for _ in range(60)]).mean(0)
    assert not torch.equal(ours(x), ours(x))
    assert (mean - exact).abs().max() < 0.5 * exact.abs().max()
    torch.testing.assert_close(ours.row_stats.entropy, rows.entropy)


WRONG = {
    "heads": ((E, 6, 4), {}, "num_heads a multiple"),
    "width": ((E, 5), {}, "embed_dim a multiple of num_heads=5"),
    "odd": ((E, 6), {"head_dim": 5}, "even number"),
    "dim": ((E, 6), {"rope": Rope(dim=6)}, "at most 4 turned"),
    "dropout": ((E, 6), {"dropout": 1.0}, "dropout from 0"),
    "softcap": ((E, 6), {"softcap": 0.0}, "softcap > 0"),
    "window": ((E, 6), {"window_size": 0}, "window_size >= 1"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_options_are_refused(wrong):
    sizes, options, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        GroupedQueryAttention(*sizes, **options)


def test_wrong_input_is_refused():
    ours, x = GroupedQueryAttention(E, H), torch.randn(B, M, E)
    table = torch.zeros(M, 3)
    for given, options, message in (
        (x[0], {}, r"x of shape \(batch, length, 24\)"),
        (x, {"positions": torch.arange(M - 1)}, r"positions of shape \(9,\) or \(2, 9\)"),
        (x, {"rotary_tables": (table, table)}, "width 4 or 2"),
        (x, {"rotary_tables": (table[:4, :2], table[:, :2])}, "cosines and sines of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            ours(given, **options)
    with pytest.raises(ValueError, match="without rope, got some"):
        GroupedQueryAttention(E, H, rope=None)(x, positions=torch.arange(M))
