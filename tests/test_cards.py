"""Models over two cards, with NCCL between them: what they report is what one card reports of the whole batch."""

import pickle

import numpy as np
import processes_cards
import pytest
import torch
from attention_models import Direct
from processes_sharded import snapshots, trained
from sharded_models import INPUTS, sharp_model, stack

from hnf_attention import AttentionStabilityMonitor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < processes_cards.SIZE, reason="needs two cards"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cards")
    torch.multiprocessing.spawn(processes_cards.main, (str(folder),), processes_cards.SIZE)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(processes_cards.SIZE)]


def same(layers, expected):
    assert list(layers) == list(expected)
    for name, stats in layers.items():
        np.testing.assert_allclose(stats.values, expected[name].values, rtol=2e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("scenario", ["data_parallel", "fsdp"])
def test_parts_of_a_batch_are_judged_and_treated_as_the_whole(found, scenario):
    model = sharp_model().cuda()
    monitor = AttentionStabilityMonitor(model, log_every=1, auto_intervene=True)
    if scenario == "fsdp":
        trained(model, INPUTS.cuda(), monitor, steps=1)
    else:
        model(INPUTS.cuda())
        monitor.on_step()
    assert monitor.applied
    for process in found:
        (layers,), weight = process[scenario]
        same(layers, snapshots(monitor)[0])
        torch.testing.assert_close(
            weight, model.blocks[0].attn.qkv.weight.detach().cpu(), rtol=1e-3, atol=1e-4
        )


def test_heads_over_two_cards_get_their_global_numbers(found):
    model = stack().cuda()
    with AttentionStabilityMonitor(model, log_every=1) as monitor:
        out = model(INPUTS.cuda())
        monitor.on_step()
    for process in found:
        (layers,), theirs = process["tensor_parallel"]
        torch.testing.assert_close(theirs, out.detach().cpu(), rtol=1e-3, atol=1e-4)
        same(layers, snapshots(monitor)[0])


def test_a_ring_over_two_cards_reports_the_whole_sequence(found):
    model = Direct()
    with AttentionStabilityMonitor(model, log_every=1) as monitor, torch.no_grad():
        model(*(x.cuda() for x in processes_cards.RING), is_causal=True)
        monitor.on_step()
    expected = snapshots(monitor)[0]
    for process in found:
        (layers,), bit_equal = process["context_parallelism"]
        assert bit_equal
        assert list(layers) == list(expected)
        for name in (
            "rows",
            "entropy",
            "max_weight",
            "max_logit",
            "min_logit",
            "logit_range",
            "log2_curvature",
        ):
            mine, theirs = (getattr(x[""], name) for x in (layers, expected))
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5, err_msg=name)
