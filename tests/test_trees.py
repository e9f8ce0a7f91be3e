"""RowStats as a tree of tensors, tensors without numbers, scales that a compiler does not know."""

import copy
import io

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from hnf_attention import attention, attention_stats
from hnf_attention.statistics.rows import RowStats


def qkv(length=5, **options):
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(1, 2, length, 4, generator=generator).to(**options) for _ in range(3)]


def test_row_statistics_are_equal_only_to_themselves():
    rows = attention_stats(*qkv()[:2])
    other = copy.copy(rows)
    assert rows == rows and rows != other and rows in [other, rows] and rows not in [other]
    assert len({rows, other}) == 2


class Measured(nn.Module):
    """Returns the output and the statistics of attention."""

    def __init__(self, **options):
        super().__init__()
        self.project, self.options = nn.Linear(4, 4), options

    def forward(self, query, key, value):
        return attention(self.project(query), key, value, **self.options)


class Merged(nn.Module):
    """Takes statistics, too."""

    def forward(self, rows, other):
        return rows.merge(other)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_an_exported_model_returns_row_statistics_after_a_round_trip(strict, dynamic):
    model = Measured(is_causal=True, extended=True)
    length = torch.export.Dim("length", min=2, max=64)
    shapes = [{2: length}] * 3 if dynamic else None
    program = torch.export.export(model, tuple(qkv()), strict=strict, dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for length in (5, 9) if dynamic else (5,):
        got, wanted = loaded(*qkv(length)), model(*qkv(length))
        assert type(got[1]) is RowStats
        torch.testing.assert_close([got[0], *leaves(got[1])], [wanted[0], *leaves(wanted[1])])


def leaves(rows):
    return [x for x in vars(rows).values() if x is not None]


@pytest.mark.slow
def test_an_exported_model_takes_row_statistics():
    query, key, _ = qkv()
    rows = attention_stats(query, key)
    merged = torch.export.export(Merged(), (rows, rows)).module()(rows, rows)
    torch.testing.assert_close(leaves(merged), leaves(rows.merge(rows)))


class Statistics(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return attention_stats(self.query(x), self.key(x))


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_fully_sharded_modules_see_the_tensors_of_row_statistics(one_process):
    model, x = Statistics(), qkv()[0]
    model(x).entropy.sum().backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    fully_shard(model, mesh=one_process, mp_policy=MixedPrecisionPolicy(output_dtype=torch.float64))
    rows = model(x)
    assert rows.lse.dtype == rows.entropy.dtype == torch.float64
    rows.entropy.sum().backward()
    torch.testing.assert_close([p.grad.full_tensor() for p in model.parameters()], wanted)


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_meta_tensors_give_meta_results(extended, softcap):
    query, key, value = qkv(device="meta", dtype=torch.bfloat16)
    query.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out, rows = attention(query, key, value, extended=extended, softcap=softcap, is_causal=True)
        some = attention_stats(query, key, sample=(2, 1))
    (out.sum() + rows.entropy.sum()).backward()
    results = [out, query.grad, *leaves(rows), *leaves(some)]
    assert {x.device.type for x in results} == {"meta"}
    assert out.shape == query.shape and out.dtype == torch.bfloat16 and rows.lse.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_scale_may_come_from_a_dynamic_shape(backend):
    def scaled(query, key, value):
        softcap = query.shape[2] / 2
        return attention(query, key, value, scale=query.shape[2] ** -0.5, softcap=softcap)[1].entropy

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(scaled, fullgraph=True, dynamic=True, backend=backend)
    for length in (5, 6, 7):
        torch.testing.assert_close(compiled(*qkv(length)), scaled(*qkv(length)))


@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
def test_a_scale_that_is_not_finite_is_refused(number):
    with pytest.raises(ValueError, match="expected scale finite, got"):
        attention(*qkv(), scale=number)
