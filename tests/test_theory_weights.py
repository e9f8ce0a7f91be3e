"""`weight_logit_bound`: never below what any input reaches, and reached by the worst one where it is exact."""

import pytest
import torch

from hnf_attention.theory import HeadWeights, Norm, fold_norm, weight_logit_bound, weight_score_std

WIDTH, DIM, HEADS = 24, 8, 4


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(centred=True, biases=True, kv=HEADS, seed=0):
    norm = Norm(draw(WIDTH, seed=seed) + 1, draw(WIDTH, seed=seed + 1) * biases, centred)
    q, k = draw(HEADS, DIM, WIDTH, seed=seed + 2), draw(kv, DIM, WIDTH, seed=seed + 3)
    bias = [draw(h, DIM, seed=seed + 4 + h) if biases else None for h in (HEADS, kv)]
    return norm, q, k, *bias


def normalised(x, norm):
    x = x - x.mean(-1, keepdim=True) if norm.centred else x
    return x / x.square().mean(-1, keepdim=True).sqrt() * norm.gain + norm.bias


def rotate(x, angle, interleaved, turned=DIM):
    """RoPE at one position, on the first `turned` dimensions of the last axis."""
    head, rest = x[..., :turned], x[..., turned:]
    angles = angle / 10.0 ** (torch.arange(turned // 2, dtype=torch.float64) / 2)
    if interleaved:
        a, b = head[..., ::2], head[..., 1::2]
    else:
        a, b = head.chunk(2, -1)
    a, b = a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()
    head = torch.stack([a, b], -1).flatten(-2) if interleaved else torch.cat([a, b], -1)
    return torch.cat([head, rest], -1)


def scores(parts, x, scale, turn=lambda y, positions: y):
    norm, q, k, q_bias, k_bias = parts
    x = normalised(x, norm)
    queries = torch.einsum("nw,hdw->hnd", x, q) + (0 if q_bias is None else q_bias[:, None])
    keys = torch.einsum("nw,hdw->hnd", x, k) + (0 if k_bias is None else k_bias[:, None])
    keys = keys.repeat_interleave(len(q) // len(k), 0)
    positions = torch.arange(len(x), dtype=torch.float64)[:, None]
    return scale * turn(queries, positions) @ turn(keys, positions).transpose(1, 2)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("kv", [4, 2, 1])
def test_no_input_exceeds_it(centred, biases, kv):
    for seed in range(5):
        parts = make(centred, biases, kv, seed)
        bound = weight_logit_bound(fold_norm(*parts[1:3], parts[0], *parts[3:]), 0.3)
        found = scores(parts, draw(200, WIDTH, seed=seed + 50), 0.3).abs().amax((1, 2))
        assert bound.shape == (HEADS,) and (found <= bound).all() and (found > bound / 20).all()


def test_the_worst_input_reaches_it_without_biases():
    parts = make(centred=False, biases=False)
    heads = fold_norm(*parts[1:3], parts[0])
    bound = weight_logit_bound(heads, 0.3)
    for h in range(HEADS):
        u, _, v = torch.linalg.svd(heads.query[h].T @ heads.key[h])
        worst = torch.stack([u[:, 0], v[0]])
        assert scores(parts, worst, 0.3)[h, 0, 1].abs() == pytest.approx(float(bound[h]), rel=1e-4)


@pytest.mark.parametrize("interleaved", [True, False, None])
@pytest.mark.parametrize("turned", [DIM, DIM // 2])
def test_rope_is_bounded_whatever_the_positions(interleaved, turned):
    for seed in range(5):
        norm, q, k, *biases = make(seed=seed)
        k = k * torch.logspace(-1, 1, DIM, dtype=torch.float64)[:, None]  # unequal pairs
        heads = fold_norm(q, k, norm, *biases)
        bound = weight_logit_bound(heads, 0.3, rotary=turned, interleaved=interleaved)
        for order in (True, False) if interleaved is None else (interleaved,):
            found = scores(
                (norm, q, k, *biases),
                draw(100, WIDTH, seed=seed),
                0.3,
                lambda y, p, o=order: rotate(y, p, o, turned),
            )
            assert (found.abs().amax((1, 2)) <= bound).all()
        if interleaved is not None:  # balancing the pairs can only help
            assert (
                bound <= weight_logit_bound(heads, 0.3, rotary=turned, interleaved=None) * (1 + 1e-9)
            ).all()


def test_caps_limits_and_biases():
    parts = make()
    heads = fold_norm(*parts[1:3], parts[0], *parts[3:])
    free = weight_logit_bound(heads, 0.3)
    assert (weight_logit_bound(heads, 0.3, softcap=5.0) == 5.0).all()
    assert torch.allclose(weight_logit_bound(heads, 0.3, bias=2.0), free + 2.0)
    normed = weight_logit_bound(heads, DIM**-0.5, query_limit=DIM**0.5, key_limit=DIM**0.5)
    assert torch.allclose(normed, torch.full((HEADS,), DIM**0.5, dtype=torch.float64), rtol=1e-4)
    wide = weight_logit_bound(heads, 0.3, dtype=torch.bfloat16)
    assert (wide > free).all() and (wide < 1.2 * free).all()


@pytest.mark.parametrize("turned", [0, DIM, DIM // 2])
def test_the_expected_spread_is_that_of_isotropic_inputs(turned):
    norm, q, k, *biases = make(centred=False, seed=3)
    norm = Norm(torch.ones(WIDTH, dtype=torch.float64), torch.zeros(WIDTH, dtype=torch.float64), False)
    turn = (lambda y, p: rotate(y, 100 * p, False, turned)) if turned else (lambda y, p: y)
    found = torch.stack(
        [
            scores((norm, q, k, *biases), draw(150, WIDTH, seed=s), 0.3, turn).var(-1).mean(-1)
            for s in range(20)
        ]
    )
    predicted = weight_score_std(fold_norm(q, k, norm, *biases), 0.3, rotary=turned)
    assert torch.allclose(found.mean(0).sqrt(), predicted, rtol=0.15)


def test_refuses_shapes_that_do_not_fit():
    norm, q, k, *_ = make()
    for query, key in ((q[..., :-1], k), (q, k[:, :-1]), (q, k[:3])):
        with pytest.raises(ValueError, match=r"expected query \(H, D, 24\)"):
            fold_norm(query, key, norm)
    assert HeadWeights(q, k[:2], q[..., 0], k[:2, :, 0]).group == 2
