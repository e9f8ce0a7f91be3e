"""Models split over two and four processes: what they report is what one process reports of the whole batch."""

import re

import numpy as np
import processes_sharded
import pytest
import torch
from attention_models import Direct
from processes import by_scenario, needs_gloo, start
from sharded_models import (
    BROKEN,
    CLIP,
    HEADS,
    INPUTS,
    LENGTH,
    LLAMA,
    MASK,
    REAL,
    TOKENS,
    GatheringAttention,
    Layouts,
    PartedAttention,
    sharp_model,
    stack,
    zigzag,
)

from hnf_attention import AttentionStabilityMonitor, apply_intervention
from hnf_attention.statistics.fields import NUM_FIELDS, SUM_FIELDS

pytest.importorskip("transformers.distributed", reason="needs a transformers that splits models itself")
pytestmark = [
    pytest.mark.slow,
    needs_gloo,
]
# Two more processes for one test. tests/test_actions_distributed.py clips shards, too.
of_two = pytest.mark.parametrize("found", [pytest.param(2, marks=pytest.mark.exhaustive)], indirect=True)
# Where queries are split, blocks of 64 rows begin anew in each process, and each finds the sinks of its own queries.
OF_EACH_PROCESS = np.array(
    [name.endswith("_blocks") or name in ("sink_mass", "rest_entropy", "stray_rows") for name in SUM_FIELDS]
    + [False] * (NUM_FIELDS - len(SUM_FIELDS))
)


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.exhaustive), 4])
def found(request, tmp_path_factory):
    """By scenario, what each process found."""
    folder = tmp_path_factory.mktemp("sharded")
    _llama().save_pretrained(folder)
    start(processes_sharded.main, (request.param, str(folder)), request.param)
    return by_scenario(folder, request.param)


def _llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()


def alone(model, *inputs, **options):
    """Output and statistics in this process."""
    with AttentionStabilityMonitor(model, log_every=1) as monitor, torch.no_grad():
        out = model(*inputs, **options)
        monitor.on_step()
    return out, monitor.history[-1].layers


def same(layers, expected, fields=slice(None)):
    """Up to the last digits, which differ between matrix products of other shapes."""
    assert list(layers) == list(expected)
    for name, stats in layers.items():
        assert (stats.head_dim, stats.dtype) == (expected[name].head_dim, expected[name].dtype)
        np.testing.assert_allclose(
            stats.values[fields], expected[name].values[fields], rtol=1e-4, atol=1e-5, err_msg=name
        )


def test_fsdp2_reports_the_whole_batch_and_trains_bit_equal(found):
    model = sharp_model()
    monitor = AttentionStabilityMonitor(model, log_every=1)
    _, diagnoses = processes_sharded.trained(model, INPUTS, monitor)
    expected = [(i.layer, i.head, i.issue_type) for i in diagnoses[0].issues]
    assert expected
    for snapshots, issues, bit_equal in found["fsdp"]:
        assert bit_equal
        assert issues == expected
        assert len(snapshots) == 3
        same(snapshots[0], monitor.history[0].layers)


def test_fsdp2_weights_are_treated_by_the_monitor_as_in_one_process(found):
    model = sharp_model()
    monitor = AttentionStabilityMonitor(model, log_every=1, auto_intervene=True)
    model(INPUTS)
    monitor.on_step()
    for applied, weight in found["fsdp_treated"]:
        assert applied == len(monitor.applied) == 1
        torch.testing.assert_close(weight, model.blocks[0].attn.qkv.weight.detach(), rtol=1e-5, atol=1e-6)


@of_two
def test_every_layout_is_clipped_in_shards_exactly_as_whole(found):
    model = Layouts()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    apply_intervention(None, CLIP, model)
    for after, back, again in found["layouts"]:
        assert back and again
        assert all(torch.equal(after[name], p) for name, p in model.named_parameters())
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name.split(".")[0] for name in changed} == set(CLIP["layers"])


def test_tensor_parallel_heads_get_their_global_numbers(found):
    out, layers = alone(stack(), INPUTS)
    size = len(found["tensor_parallel"])
    for rank, (theirs, part) in enumerate(found["tensor_parallel"]):
        torch.testing.assert_close(part, out.chunk(size // 2)[rank // 2], rtol=1e-4, atol=1e-5)
        same(theirs, layers)


def test_attention_over_dtensors_is_measured_where_its_parts_are_whole_heads(found):
    _, expected = alone(Direct(), *BROKEN, attn_mask=MASK)
    assert expected[""].nonfinite_out.tolist() == [0, 0, 16, 0]
    for process in found["distributed_tensors"]:
        for name in ("heads", "batch"):
            coverage, (layers,), same_output = process[name]
            assert same_output and not coverage.not_measured
            same(layers, expected)
        coverage, _, stays_one = process["fused"]
        assert stays_one and "probe: its tensors are split over processes" in coverage.measured[""]
        for name, reason in (
            ("queries", r"split over processes as \(Shard\(dim=2\),\), not by batch"),
            ("everywhere", r"split over processes as \(Replicate\(\),\), not by batch"),
            ("uneven", r"query \(4, 3, 16, 8\) is split unevenly"),
        ):
            coverage, snapshots, same_output = process[name]
            assert same_output and not snapshots and not coverage.measured
            assert re.search(reason, coverage.not_measured[""])


def test_queries_split_by_context_parallel_are_those_of_one_sequence(found):
    whole = INPUTS
    expected = [alone(stack(GatheringAttention), x) for x in (whole[:, : LENGTH // 2], whole)]
    padded = stack(GatheringAttention)
    for layer in padded:
        layer.real = REAL
    expected.append(alone(padded, whole))
    assert expected[2][1]["0"].left_out_rows.tolist() == [(~REAL).sum()] * HEADS
    size = len(found["gathered_keys"])
    for rank, (readings, processes) in enumerate(found["gathered_keys"]):
        assert processes == size
        for (theirs, part), (out, layers) in zip(readings, expected, strict=True):
            mine = out.chunk(size // 2)[rank // 2][:, zigzag(rank % 2, 2, out.shape[1])]
            torch.testing.assert_close(part, mine, rtol=1e-4, atol=1e-5)
            same(theirs, layers, ~OF_EACH_PROCESS)
            np.testing.assert_allclose(theirs["0"].log2_curvature, layers["0"].log2_curvature, rtol=1e-5)


def test_queries_split_by_context_parallel_have_the_sinks_of_each_process(found):
    out, layers = alone(stack(PartedAttention), INPUTS)
    torch.testing.assert_close(out, alone(stack(GatheringAttention), INPUTS)[0], rtol=1e-4, atol=1e-5)
    for readings, _ in found["gathered_keys"]:
        same(readings[1][0], layers, OF_EACH_PROCESS)


def test_context_parallelism_without_a_ring_is_listed_whichever_came_first(found):
    for coverages, module in found["torch_context_parallel"]:
        assert all(not coverage.measured for coverage in coverages)
        reasons = [coverage.not_measured[""] for coverage in coverages]
        assert "split over processes as (Shard(dim=2),)" in reasons[0]
        assert "context_parallel computed it without a ring" in reasons[1]
        assert module != "torch.distributed.tensor.experimental._context_parallel._attention"


def test_pipeline_stages_report_every_layer_under_its_own_name(found):
    size = len(found["pipeline"])
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.layers = torch.nn.ModuleDict({str(number): stack()[0] for number in range(size)})
    model.forward = lambda x: torch.nn.Sequential(*model.layers.values())(x)
    _, expected = alone(model, INPUTS)
    for layers in found["pipeline"]:
        assert list(layers) == [f"layers.{stage}" for stage in range(size)]
        same(layers, expected)


@of_two
def test_llama_split_by_its_own_plan_reports_as_in_one_process(found):
    model = _llama()
    with AttentionStabilityMonitor(model, log_every=1) as monitor, torch.no_grad():
        logits = model(TOKENS).logits
        monitor.on_step()
    for layers, theirs in found["llama"]:
        torch.testing.assert_close(theirs, logits, rtol=1e-4, atol=1e-5)
        same(layers, monitor.history[-1].layers)
