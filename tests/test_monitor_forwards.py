"""Which forwards of a real model a monitor judges, and as how many layers."""

import pytest
import torch
from attention_models import Attention
from tiny_gpt2 import LAYERS, tiny_gpt2
from torch import nn

from hnf_attention import AttentionAnalyzer, AttentionStabilityMonitor, instrument

TOKENS = torch.randint(0, 40, (4, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    return tiny_gpt2()


@pytest.fixture
def train_step():
    def step(model):
        model(TOKENS, labels=TOKENS).loss.backward()

    return step


def test_an_evaluation_is_left_out_and_the_snapshot_says_so(model, train_step):
    monitor = AttentionStabilityMonitor(model, log_every=2, record_every=1)
    for _ in range(2):
        train_step(model)
        model.eval()
        with torch.no_grad():
            model(TOKENS)
            model(TOKENS)
        model.train()
        diagnosis = monitor.on_step()
    assert (diagnosis.stats[LAYERS[0]].rows == 2 * 4 * 24).all()
    assert monitor.history[-1].holds == "2 training forwards (4 evaluation forwards left out)"


def test_training_in_eval_mode_is_training(model, train_step):
    monitor = AttentionStabilityMonitor(model.eval(), log_every=1)
    train_step(model)
    monitor.on_step()
    assert monitor.history[-1].holds == "1 training forward"


def test_without_training_an_evaluation_is_measured(model):
    monitor = AttentionStabilityMonitor(model, log_every=1)
    with torch.no_grad():
        model(TOKENS)
    assert (monitor.on_step().stats[LAYERS[0]].rows == 4 * 24).all()
    assert monitor.history[-1].holds == "1 evaluation forward"


def test_a_forward_that_raised_and_is_tried_again_counts_once(model):
    monitor = AttentionStabilityMonitor(model, log_every=1)
    with pytest.raises(IndexError):
        model(TOKENS, labels=TOKENS + 100)  # after every layer has run
    model(TOKENS, labels=TOKENS)
    assert (monitor.on_step().stats[LAYERS[0]].rows == 4 * 24).all()
    assert monitor.history[-1].holds == "1 training forward (1 failed forward left out)"


class Shared(nn.Module):
    """One block four times over, as in a Universal Transformer."""

    def __init__(self):
        super().__init__()
        self.block = Attention()

    def forward(self, x):
        for depth in range(4):
            x = self.block(x * (100.0 if depth == 3 else 1.0))
        return x


def test_the_calls_of_a_shared_block_are_judged_one_by_one():
    torch.manual_seed(0)
    model = Shared()
    monitor = AttentionStabilityMonitor(model, log_every=1)
    model(torch.randn(2, 20, 16))
    stats = monitor.on_step().stats
    assert list(stats) == [f"block#{depth}" for depth in range(4)]
    assert stats["block#3"].normalized_entropy.mean() < 0.2 < stats["block#0"].normalized_entropy.mean()


class Loop(Shared):
    def forward(self, x):
        for _ in range(40):
            x = self.block(x).tanh()
        return x


def test_a_loop_over_a_block_has_sixteen_names_at_most():
    """Cells of a recurrent network, or decoding inside of a forward, would have one for each token."""
    model, x = Loop(), torch.randn(2, 5, 16)
    with instrument(model) as handle, AttentionStabilityMonitor(model, log_every=1) as monitor:
        model(x)
        stats = monitor.on_step().stats
        assert list(stats) == list(handle.latest) == [f"block#{call}" for call in range(16)]
        assert "calls in one forward from #15 on together" in handle.coverage.measured["block"]
    assert (stats["block#14"].rows == 10).all() and (stats["block#15"].rows == 25 * 10).all()


def test_a_snapshot_keeps_no_numbers_but_its_own(model, train_step):
    monitor = AttentionStabilityMonitor(model, log_every=1)
    with torch.no_grad():
        model(TOKENS)  # evaluations are left out of the snapshot
    train_step(model)
    monitor.on_step()
    assert all(stats.values.base is None for stats in monitor.history[0].layers.values())


def test_a_part_of_the_model_that_threads_call_by_itself_is_read():
    import threading

    torch.manual_seed(0)
    model = nn.Sequential(Attention(), Attention())
    monitor = AttentionStabilityMonitor(model, log_every=1)
    threads = [threading.Thread(target=lambda: model[0](torch.randn(1, 20, 16))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert monitor.on_step().stats["0"].rows[0] == 60
    assert monitor.history[-1].holds == "3 training forwards"


def test_an_analyzer_inside_of_a_monitored_run(model, train_step):
    monitor = AttentionStabilityMonitor(model, log_every=1)
    train_step(model)
    with AttentionAnalyzer(model) as analyzer, torch.no_grad():
        model(TOKENS[:1])
        assert (analyzer.diagnose().stats[LAYERS[0]].rows == 24).all()
    assert (monitor.on_step().stats[LAYERS[0]].rows == 4 * 24).all()
    train_step(model)
    assert (monitor.on_step().stats[LAYERS[0]].rows == 4 * 24).all()


def test_data_parallelism_and_its_model_are_one_model_to_monitors_and_analyzers(tmp_path, model):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        monitor = AttentionStabilityMonitor(parallel, log_every=1)
        parallel(TOKENS)
        with AttentionAnalyzer(model) as analyzer, torch.no_grad():
            parallel(TOKENS[:1])
            assert list(analyzer.diagnose().stats) == LAYERS
        assert monitor.on_step() and monitor.history[-1].holds.startswith("1 training forward (1 eval")
    finally:
        torch.distributed.destroy_process_group()
