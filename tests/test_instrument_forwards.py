"""Forwards of an instrumented model, and the calls of a layer in each."""

import copy
import pickle
import threading
import weakref

import pytest
import torch
import transformers
from attention_models import Attention, Block, HandWrittenAttention, Model, x
from torch import nn
from torch.utils.checkpoint import checkpoint

from hnf_attention import instrument
from hnf_attention.instrumentation.compiled import layers


@pytest.fixture(autouse=True)
def never_compiled(monkeypatch):
    """Other tests compile models of these classes that nobody measures. Graphs of those may then run these ones."""
    monkeypatch.setattr(layers, "_unmeasured", weakref.WeakSet())


class Universal(nn.Module):
    """One block, called several times."""

    def __init__(self, times=4, use_reentrant=None, make=Block):
        super().__init__()
        self.block, self.times, self.use_reentrant = make(), times, use_reentrant

    def forward(self, inputs, fail_after=None):
        for number in range(self.times):
            if number == fail_after:
                raise RuntimeError("out of memory")
            if self.use_reentrant is None:
                inputs = self.block(inputs)
            else:
                inputs = checkpoint(self.block, inputs, use_reentrant=self.use_reentrant)
        return inputs


def _watched(model, run, **options):
    """(layer, forward, call) of each measurement, and the forwards that ended, of `run(model)`."""
    seen, ended = [], []
    with instrument(model, **options) as handle:
        handle.on_measure = lambda m: seen.append((m.layer, m.forward, m.call))
        handle.on_forward_end = lambda forward: ended.append((forward, forward.failed))
        run(model)
    return seen, ended


@pytest.mark.parametrize("mode", ["probe", "fused"])
@pytest.mark.parametrize("attention", [Attention, HandWrittenAttention])
def test_a_shared_block_has_a_call_for_each_time(attention, mode):
    model = Universal(make=attention)
    seen, ended = _watched(model, lambda m: (m(x()), m(x())), mode=mode)
    assert [call for _, _, call in seen] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert [forward.number for _, forward, _ in seen] == [1] * 4 + [2] * 4
    assert ended == [(seen[0][1], False), (seen[4][1], False)]


def test_latest_names_the_calls_of_a_shared_block():
    model = nn.Sequential(Universal(), Attention())
    with instrument(model) as handle:
        model(x())
    assert list(handle.latest) == [f"0.block.attn#{call}" for call in range(4)] + ["1"]
    entropies = [handle.latest[f"0.block.attn#{call}"].rows.entropy for call in range(4)]
    assert not torch.equal(entropies[0], entropies[3])


def test_albert_calls_its_one_layer_twelve_times():
    config = transformers.AlbertConfig(
        vocab_size=40, embedding_size=16, hidden_size=32, num_hidden_layers=12, num_attention_heads=4,
        intermediate_size=32,
    )  # fmt: skip
    model = transformers.AlbertModel(config).eval()
    ids = torch.randint(0, 40, (2, 8))
    with torch.no_grad(), instrument(model) as handle:
        model(ids)
    layer = "encoder.albert_layer_groups.0.albert_layers.0.attention"
    assert list(handle.latest) == [f"{layer}#{call}" for call in range(12)]
    assert not handle.latest[f"{layer}#11"].forward.training


class Chunked(HandWrittenAttention):
    """One call, whose queries come in chunks."""

    def forward(self, inputs):
        q, k, v = self.split(inputs)
        parts = [(part @ k.mT).softmax(-1) @ v for part in q.split(5, 2)]
        return torch.cat(parts, 2).transpose(1, 2).flatten(2)


def test_chunks_of_one_invocation_are_one_call():
    seen, _ = _watched(nn.Sequential(Chunked(), Chunked()), lambda model: model(x()))
    assert [(layer, call) for layer, _, call in seen] == [("0", 0)] * 4 + [("1", 0)] * 4


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # reentrant, without grad
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_training_is_the_grad_mode_in_which_the_model_was_called(use_reentrant, grad):
    model = Universal(2, use_reentrant)

    def run(model):
        with torch.set_grad_enabled(grad):
            output = model(x(requires_grad=True))
        if grad:
            output.sum().backward()

    seen, ended = _watched(model, run)
    assert [call for _, _, call in seen] == [0, 1]
    assert all(forward.training == grad for _, forward, _ in seen) and len(ended) == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_forward_that_raised_has_failed_and_its_retry_has_not(error):
    model = Universal()

    def run(model):
        hook = model.block.register_forward_pre_hook(_raise_at(3, error))
        with pytest.raises(error):
            model(x())
        hook.remove()
        try:
            raise ValueError("handled")
        except ValueError:  # a retry inside of a handler has not failed for that
            model(x())

    seen, ended = _watched(model, run)
    assert [call for _, _, call in seen] == [0, 1, 0, 1, 2, 3]
    assert [forward.failed for _, forward, _ in seen] == [True] * 2 + [False] * 4
    assert [failed for _, failed in ended] == [True, False]


def _raise_at(number, error):
    calls = iter(range(1, number + 1))

    def hook(*_):
        if next(calls) == number:
            raise error

    return hook


def test_generation_has_a_forward_for_each_token():
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    seen, ended = _watched(
        model,
        lambda m: m.generate(
            torch.ones(1, 4, dtype=torch.long), max_new_tokens=5, min_new_tokens=5, do_sample=False
        ),
    )
    assert len(ended) == 5 and len(seen) == 10 and {call for _, _, call in seen} == {0}
    assert not any(forward.training for forward, _ in ended)


def test_a_part_that_is_called_by_itself_is_a_forward_of_its_own():
    model = Universal()
    seen, ended = _watched(model, lambda m: (m.block(x()), m.block(x())))
    assert [(forward.number, call) for _, forward, call in seen] == [(1, 0), (2, 0)] and not ended
    assert seen[0][1].failed is None and seen[0][1].training


def test_a_model_that_calls_itself_is_one_forward():
    class Twice(Model):
        def forward(self, inputs, again=True):
            return self(super().forward(inputs), again=False) if again else super().forward(inputs)

    seen, ended = _watched(Twice(), lambda model: model(x()))
    assert [call for _, _, call in seen] == [0, 0, 1, 1] and len(ended) == 1


def test_threads_have_forwards_of_their_own():
    model, gate = Universal(), threading.Barrier(4)

    def work():
        gate.wait()
        for _ in range(5):
            model(x())

    def run(_):
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    seen, ended = _watched(model, run)
    assert sorted(forward.number for forward, _ in ended) == list(range(1, 21))
    of_forward = {}
    for _, forward, call in seen:
        of_forward.setdefault(forward, []).append(call)
    assert len(of_forward) == 20 and all(calls == [0, 1, 2, 3] for calls in of_forward.values())


@pytest.mark.parametrize("first", ["compile", "instrument"])
def test_a_compiled_model_has_forwards_and_its_shared_blocks_are_merged(first):
    torch._dynamo.reset()
    model, inputs, seen, ended = Universal(3), x(), [], []
    if first == "compile":
        compiled = torch.compile(model, backend="eager", fullgraph=True)
    with instrument(model) as handle:
        if first == "instrument":
            compiled = torch.compile(model, backend="eager", fullgraph=True)
        handle.on_measure = seen.append
        handle.on_forward_end = ended.append
        compiled(x())
        with torch.no_grad():
            compiled(x())
    assert [forward.training for forward in ended] == [True, False]
    assert [m.forward for m in seen] == [ended[0]] * 3 + [ended[1]] * 3 and not any(m.call for m in seen)
    assert "its calls in compiled graphs together" in handle.coverage.measured["block.attn"]
    torch.testing.assert_close(compiled(inputs), model(inputs))


def test_compiled_blocks_are_told_apart():
    torch._dynamo.reset()
    model = Universal(3)
    model.block = torch.compile(model.block, backend="eager", fullgraph=True)
    with torch.no_grad():
        seen, _ = _watched(model, lambda m: m(x()))
    assert [call for _, _, call in seen] == [0, 1, 2]


def test_nothing_of_it_stays_in_the_model_its_copies_or_its_class():
    plain, model = pickle.dumps(Universal()), Universal()
    before = dict(vars(Universal)), nn.Module.__call__
    with instrument(model) as handle:
        assert not model._forward_hooks and not model._forward_pre_hooks
        ended = []
        handle.on_forward_end = ended.append
        copied = copy.deepcopy(model)
        copied(x())
        assert not ended and not handle.latest
        assert len(pickle.dumps(model)) == len(plain)
    assert (dict(vars(Universal)), nn.Module.__call__) == before
    assert "__call__" not in vars(Universal)


def test_a_callback_that_raises_ends_no_forward(caplog):
    def fail(_):
        raise ValueError("no")

    model = Model()
    with instrument(model) as handle:
        handle.on_forward_end = fail
        model(x())
    assert "on_forward_end failed" in caplog.text
