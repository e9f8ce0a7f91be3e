"""The callback in transformers' Trainer, on a tiny GPT-2 and bytes of text."""

import logging

import pytest
import torch
import transformers
from tiny_gpt2 import LAYERS, LENGTH, byte_windows, heat, tiny_gpt2
from torch import nn

from hnf_attention import AttentionStabilityMonitor
from hnf_attention.integrations import AttentionStabilityCallback, JSONLWriter, read_jsonl
from hnf_attention.names import unwrapped

pytest.importorskip("accelerate")

BATCH = 4


class Data(torch.utils.data.Dataset):
    """Windows of text; the one numbered `broken` cannot be had."""

    def __init__(self, count=32, broken=None):
        self.windows, self.broken = byte_windows(count), broken

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, index):
        if index == self.broken:
            raise OSError("file lost")
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


@pytest.fixture
def make(tmp_path):
    """A Trainer of four-sample batches that logs every second step."""

    def trainer(callbacks, model=None, data=None, **arguments):
        default = dict(
            output_dir=str(tmp_path / "out"),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            per_device_train_batch_size=BATCH,
            max_steps=6,
            logging_steps=2,
            learning_rate=1e-3,
            save_strategy="no",
            dataloader_pin_memory=False,
        )
        return transformers.Trainer(
            model=tiny_gpt2(256) if model is None else model,
            args=transformers.TrainingArguments(**default | arguments),
            train_dataset=data or Data(),
            eval_dataset=Data(8),
            callbacks=callbacks,
        )

    return trainer


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_only_training_is_measured_once_per_optimizer_step(make):
    seen = []
    callback = AttentionStabilityCallback(writers=[seen.append])
    trainer = make(
        [callback], gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=1, eval_on_start=True
    )
    trainer.train()
    assert [diagnosis.step for diagnosis in seen] == [2, 4, 6]  # as often as the Trainer logs
    for diagnosis in seen:
        assert list(diagnosis.stats) == LAYERS
        assert (diagnosis.stats[LAYERS[0]].rows == 2 * BATCH * LENGTH).all()
    assert callback.last_diagnosis is seen[-1] and callback.monitor.step == trainer.state.global_step


@pytest.mark.slow
def test_the_models_numbers_join_the_trainers_logs(make, capsys):
    callback = AttentionStabilityCallback(log_every=4, record_every=1)
    trainer = make([callback], eval_strategy="steps", eval_steps=4)
    trainer.train()
    (line,) = [line for line in trainer.state.log_history if "attn/errors" in line]
    assert line["step"] == 4 and "loss" in line  # each snapshot once, and not with an evaluation's numbers
    (stats,) = [s for s in callback.monitor.history if s.step == 4]
    lowest = min(layer.normalized_entropy.min() for layer in stats.layers.values())
    assert line["attn/normalized_entropy_min"] == pytest.approx(lowest)
    assert (stats.layers[LAYERS[0]].rows == 4 * BATCH * LENGTH).all()
    assert capsys.readouterr().out.count("attn/normalized_entropy_min") == 1


def test_it_does_not_change_the_training_and_leaves_the_model_as_it_was(make):
    plain = make([])
    plain.train()
    watched = make([AttentionStabilityCallback(record_every=1, auto_intervene=True)])
    watched.train()
    assert losses(watched) == losses(plain)
    AttentionStabilityMonitor(watched.model).restore()  # would be refused were it still instrumented


class Weights(transformers.TrainerCallback):
    """Copies of the query and key weights as they are after each optimizer step."""

    def __init__(self):
        self.seen, self.had_gradients = [], []

    def on_optimizer_step(self, args, state, control, model=None, **_):
        weight = model.transformer.h[0].attn.c_attn.weight
        self.seen.append(weight.detach().clone())
        self.had_gradients.append(weight.grad is not None)


class WeightsAfter(Weights):
    """The Trainer takes each class of callback once without a warning."""


def test_interventions_change_weights_after_the_step_and_rates_for_good(make, caplog):
    model = tiny_gpt2(256)
    heat(model)
    before, after = Weights(), WeightsAfter()
    callback = AttentionStabilityCallback(auto_intervene=True)
    trainer = make([before, callback, after], model=model, max_steps=8)
    trainer.train()

    first = callback.monitor.applied[0]
    assert first.intervention["action"] == "qk_clip" and "lr_factor" not in first.intervention
    factors = (30.0 / torch.tensor(first.intervention["layers"][LAYERS[0]])).sqrt()
    assert (factors < 0.2).all()
    old, new = before.seen[1], after.seen[1]
    scale = factors.repeat_interleave(8).repeat(2)  # of each head's queries, then of its keys
    torch.testing.assert_close(new[:, :64], old[:, :64] * scale, rtol=1e-5, atol=0)
    torch.testing.assert_close(new[:, 64:], old[:, 64:], rtol=0, atol=0)
    torch.testing.assert_close(after.seen[0], before.seen[0], rtol=0, atol=0)
    assert all(after.had_gradients)  # before zero_grad

    tops = [max(s.layers[name].max_abs_logit.max() for name in LAYERS) for s in callback.monitor.history]
    assert tops[0] > 500 and max(tops[1:]) < 100
    second = callback.monitor.applied[1]
    assert second.intervention["action"] == "reduce_lr" and second.intervention["factor"] == 0.5
    rates = {line["step"]: line["learning_rate"] for line in trainer.state.log_history if "loss" in line}
    # Linear decay from 1e-3 over 8 steps, which the intervention after step 2 halves to the end.
    decay = {step: 1e-3 * (9 - step) / 8 for step in (2, 4, 6, 8)}
    assert rates == pytest.approx({step: rate if step == 2 else rate / 2 for step, rate in decay.items()})
    messages = [r.getMessage() for r in caplog.records if r.name == "hnf_attention"]
    assert sum("intervened at step 2: qk_clip" in message for message in messages) == 1
    assert sum("intervened at step 2: reduce_lr" in message for message in messages) == 1


@pytest.mark.slow
def test_without_auto_intervene_nothing_is_done(make):
    model = tiny_gpt2(256)
    heat(model)
    callback = AttentionStabilityCallback()
    make([callback], model=model).train()
    assert callback.last_diagnosis.errors and not callback.monitor.applied


@pytest.mark.slow
def test_a_fault_in_the_rest_of_an_intervention_ends_no_run(make, caplog):
    model = tiny_gpt2(256)
    heat(model)
    callback = AttentionStabilityCallback(auto_intervene=True)
    callback._end_step = lambda optimizers, end=callback._end_step: end([(None, None)])
    trainer = make([callback], model=model)
    trainer.train()
    assert trainer.state.global_step == 6 and len(callback.monitor.applied) > 0
    assert caplog.text.count('part "the trainer\'s interventions" failed at step 2') == 1


@pytest.mark.slow
def test_step_numbers_go_on_where_a_run_resumes(make, tmp_path):
    path = tmp_path / "attention.jsonl"

    def callbacks():
        return [AttentionStabilityCallback(log_every=3, writers=[JSONLWriter(path)])]

    make(callbacks(), save_strategy="steps", save_steps=4, max_steps=6).train()
    assert [line["step"] for line in read_jsonl(path).snapshots] == [3, 6]
    checkpoint = str(tmp_path / "out" / "checkpoint-4")
    make(callbacks(), max_steps=9).train(resume_from_checkpoint=checkpoint)
    assert [line["step"] for line in read_jsonl(path).snapshots] == [3, 6, 9]
    assert path.read_text().count('"kind": "run"') == 2


@pytest.mark.slow
def test_a_writer_that_fails_is_tried_again_and_said_once_and_at_the_end(make, caplog):
    calls, good = [], []

    def failing(diagnosis):
        calls.append(diagnosis.step)
        raise OSError("disk full")

    make([AttentionStabilityCallback(writers=[failing, good.append])]).train()
    assert calls[0] == 2 and set(calls) == {2, 4} and [diagnosis.step for diagnosis in good] == [2, 4, 6]
    ours = [record for record in caplog.records if record.name == "hnf_attention"]
    assert [(r.levelno, "writer 0" in r.getMessage()) for r in ours] == [(logging.WARNING, True)] * 2
    assert "ends with 3 log steps that it did not take" in ours[1].getMessage()


@pytest.mark.slow
def test_the_monitors_options_are_handed_on(make):
    alerts = []
    model = tiny_gpt2(256)
    heat(model)
    options = dict(mode="fused", on_alert=alerts.append, history_bytes=30_000, ranks=None)
    callback = AttentionStabilityCallback(**options)
    make([callback], model=model).train()
    assert callback.monitor.instrumentation.mode == "fused" and alerts
    assert callback.monitor.history.limit == 30_000
    with pytest.raises(ValueError, match="expected the name of a threshold"):
        make([AttentionStabilityCallback(thresholds={"clip": 3})]).train()


@pytest.mark.slow
def test_a_training_after_one_that_broke_off(make, caplog):
    model = tiny_gpt2(256)
    broken = AttentionStabilityCallback()
    with pytest.raises(OSError, match="file lost"):
        make([broken], model=model, data=Data(broken=30)).train()
    callback = AttentionStabilityCallback()
    make([callback], model=model).train()
    assert callback.last_diagnosis.step == 6 and "takes over" in caplog.text
    caplog.clear()
    make([callback], model=model).train()
    assert callback.last_diagnosis.step == 6 and "takes over" not in caplog.text


@pytest.mark.slow
def test_restore_ends_it_after_an_exception(make):
    callback = AttentionStabilityCallback()
    trainer = make([callback], data=Data(broken=30))
    callback.restore()  # before there is anything to end
    with pytest.raises(OSError, match="file lost"):
        trainer.train()
    callback.restore()
    callback.restore()
    AttentionStabilityMonitor(trainer.model).restore()


def test_good_states_take_the_run_back_between_two_steps(make):
    callback = AttentionStabilityCallback(good_states={"every": 1, "keep": 4, "margin": 2})

    class Back(Weights):
        def on_optimizer_step(self, args, state, control, **given):
            super().on_optimizer_step(args, state, control, **given)
            if state.global_step == 3:  # the fourth is ending
                assert callback.states.steps == [1, 2, 3, 4]
                assert callback.states.rewind(before=4) == 2

    watched = Back()
    trainer = make([callback, watched, after := WeightsAfter()], max_steps=8, logging_steps=1)
    trainer.train()
    weights = after.seen
    assert torch.equal(weights[3], weights[1]) and not torch.equal(watched.seen[3], weights[1])
    rates = [line["learning_rate"] for line in trainer.state.log_history if "loss" in line]
    decay = [1e-3 * (8 - step) / 8 for step in (0, 1, 2, 1, 2, 3, 4, 5)]
    assert rates == pytest.approx(decay)
    assert callback.states.bytes == 0 and callback.monitor.status.off.keys() == {"recording"}


@pytest.mark.parametrize("given", [True, {"steps": 3}, {"every": 5, "optimizer": None}])
def test_wrong_options_of_good_states_are_refused(given):
    with pytest.raises(
        ValueError, match="good_states to be None or a dict with some of every, keep, margin, rng"
    ):
        AttentionStabilityCallback(good_states=given)


def test_bad_arguments_are_refused_when_training_begins(make):
    with pytest.raises(ValueError, match="expected log_every"):
        make([AttentionStabilityCallback(log_every=0)]).train()


def test_only_the_main_process_writes():
    seen = []
    callback = AttentionStabilityCallback(log_every=1, writers=[seen.append])
    model = tiny_gpt2()
    for main in (True, False):
        callback._begin(model, 1, 0, main)
        callback._resume()
        model(torch.zeros(1, LENGTH, dtype=torch.long))
        assert callback._end_step([]) is not None
    callback.restore()
    assert len(seen) == 1


def test_data_parallelism_is_looked_into():
    inner = nn.Linear(1, 1)
    assert unwrapped(nn.DataParallel(inner)) is inner and unwrapped(inner) is inner


def test_it_is_printed_short():
    callback = AttentionStabilityCallback(log_every=2)
    assert repr(callback) == "AttentionStabilityCallback(no training yet)"
    callback._begin(tiny_gpt2(), 1, 5, True)
    assert repr(callback).startswith(
        "AttentionStabilityCallback(AttentionStabilityMonitor of GPT2LMHeadModel at"
    )
    callback.restore()
