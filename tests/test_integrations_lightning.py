"""The callback in Lightning's Trainer, on a tiny GPT-2 and bytes of text."""

import csv
import importlib
import sys

import pytest
import torch
from tiny_gpt2 import LAYERS, LENGTH, byte_windows, heat, tiny_gpt2

from hnf_attention import AttentionStabilityMonitor

lightning = pytest.importorskip("lightning.pytorch")

from hnf_attention.integrations.lightning import AttentionStabilityCallback  # noqa: E402

pytestmark = [
    # What Lightning 2.6 calls, and what it has to say about data loaders without workers.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
]

BATCH = 4
NAMES = [f"gpt.{layer}" for layer in LAYERS]


class Language(lightning.LightningModule):
    """A GPT-2 whose schedule halves the learning rate over `decay` steps, in a straight line."""

    def __init__(self, decay=8):
        super().__init__()
        self.gpt, self.decay = tiny_gpt2(256), decay
        self.weights, self.rates = [], []

    def training_step(self, batch, index):
        loss = self.gpt(batch, labels=batch).loss
        self.log("loss", loss)
        return loss

    def on_before_optimizer_step(self, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_start(self, batch, index):  # after the callback's hooks of the batch before
        self.weights.append(self.gpt.transformer.h[0].attn.c_attn.weight.detach().clone())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-3)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - 0.5 * step / self.decay)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


class Validated(Language):
    def validation_step(self, batch, index):
        self.gpt(batch)


@pytest.fixture
def make(tmp_path):
    """A Trainer for the CPU that logs every second step, to a CSV file."""

    def trainer(callbacks, package="lightning.pytorch", **arguments):
        loggers = importlib.import_module(f"{package}.loggers")
        default = dict(
            default_root_dir=tmp_path,
            accelerator="cpu",
            max_steps=6,
            log_every_n_steps=2,
            logger=loggers.CSVLogger(tmp_path, name="logs", version=0),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        return importlib.import_module(package).Trainer(callbacks=callbacks, **default | arguments)

    return trainer


@pytest.fixture
def rows(tmp_path):
    def read():
        with (tmp_path / "logs" / "version_0" / "metrics.csv").open() as file:
            return list(csv.DictReader(file))

    return read


def loader(count=8):
    return torch.utils.data.DataLoader(byte_windows(BATCH * count), batch_size=BATCH)


def test_only_training_is_measured_once_per_optimizer_step(make, rows):
    seen = []
    callback = AttentionStabilityCallback(writers=[seen.append])
    trainer = make([callback], accumulate_grad_batches=2, val_check_interval=1)
    trainer.fit(Validated(), loader(12), loader(2))
    assert [diagnosis.step for diagnosis in seen] == [2, 4, 6]  # as often as the Trainer logs
    for diagnosis in seen:
        assert list(diagnosis.stats) == NAMES
        assert (diagnosis.stats[NAMES[0]].rows == 2 * BATCH * LENGTH).all()
    assert callback.monitor.step == trainer.global_step == 6

    ours = [row for row in rows() if row["attn/errors"]]
    losses = [row for row in rows() if row["loss"]]
    assert [row["step"] for row in ours] == [row["step"] for row in losses]  # on the same axis
    lowest = min(stats.normalized_entropy.min() for stats in seen[0].stats.values())
    assert float(ours[0]["attn/normalized_entropy_min"]) == pytest.approx(lowest)


def test_good_states_take_the_run_back_between_two_steps(make):
    callback = AttentionStabilityCallback(good_states={"every": 1, "keep": 4, "margin": 2})

    class Back(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            if trainer.global_step == 4 and not callback.states.jumps:
                assert callback.states.steps == [1, 2, 3, 4]
                assert callback.states.rewind(before=4) == 2

    module = Language()
    make([callback, Back()], logger=False).fit(module, loader())
    weights, rates = module.weights, module.rates
    assert torch.equal(weights[4], weights[2]) and not torch.equal(weights[3], weights[2])
    assert rates == pytest.approx([1e-3 * (1 - step / 16) for step in (0, 1, 2, 3, 2, 3)])
    assert callback.states.bytes == 0


def test_it_does_not_change_the_training_and_leaves_the_model_as_it_was(make):
    def weights(callbacks):
        module = Language()
        make(callbacks, logger=False).fit(module, loader())
        AttentionStabilityMonitor(module).restore()  # would be refused were it still instrumented
        return module.weights

    plain, watched = weights([]), weights([AttentionStabilityCallback(record_every=1, auto_intervene=True)])
    assert len(plain) == 6 and all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


def test_interventions_change_weights_after_the_step_and_rates_for_good(make):
    def fitted(callbacks):
        module = Language()  # which seeds the generator that dropout draws from
        heat(module.gpt)
        make(callbacks, max_steps=8, logger=False).fit(module, loader())
        return module

    callback = AttentionStabilityCallback(log_every=3, auto_intervene=True)
    module, untreated = fitted([callback]), fitted([])
    clip, slower = callback.monitor.applied[0], callback.monitor.applied[1]
    assert (clip.intervention["action"], slower.intervention["action"]) == ("qk_clip", "reduce_lr")
    factors = (30.0 / torch.tensor(clip.intervention["layers"][NAMES[0]])).sqrt()
    scale = factors.repeat_interleave(8).repeat(2)  # of each head's queries, then of its keys
    old, new = untreated.weights[3], module.weights[3]  # after three steps
    assert torch.equal(untreated.weights[2], module.weights[2])
    torch.testing.assert_close(new[:, :64], old[:, :64] * scale, rtol=1e-5, atol=0)
    torch.testing.assert_close(new[:, 64:], old[:, 64:], rtol=0, atol=0)

    decay = [1e-3 * (1 - step / 16) for step in range(8)]
    assert module.rates == pytest.approx([rate if step < 3 else rate / 2 for step, rate in enumerate(decay)])
    tops = [max(s.layers[name].max_abs_logit.max() for name in NAMES) for s in callback.monitor.history]
    assert tops[0] > 500 and tops[1] < 100


def test_an_exception_restores_the_model(make):
    class Broken(Language):
        def training_step(self, batch, index):
            if index == 3:
                raise OSError("file lost")
            return super().training_step(batch, index)

    module, callback = Broken(), AttentionStabilityCallback()
    with pytest.raises(OSError, match="file lost"):
        make([callback]).fit(module, loader())
    AttentionStabilityMonitor(module).restore()
    assert callback.last_diagnosis.step == 2


def test_step_numbers_go_on_where_a_run_resumes(make, tmp_path):
    steps = []

    def fit(**arguments):
        callback = AttentionStabilityCallback(
            log_every=3, writers=[lambda diagnosis: steps.append(diagnosis.step)]
        )
        trainer = make([callback], logger=False, **arguments)
        path = tmp_path / "last.ckpt"
        trainer.fit(Language(), loader(4), ckpt_path=str(path) if path.exists() else None, weights_only=True)
        trainer.save_checkpoint(path)

    fit(max_steps=4)
    fit(max_steps=9)
    assert steps == [3, 6, 9]


def test_several_optimizers_are_one_step_and_all_slowed_down(make):
    class Two(Language):
        def configure_optimizers(self):
            halves = [self.gpt.transformer, self.gpt.lm_head]
            return [torch.optim.SGD(half.parameters(), lr=1e-3) for half in halves]

        def training_step(self, batch, index):
            self.manual_backward(self.gpt(batch, labels=batch).loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    module, callback = Two(), AttentionStabilityCallback(log_every=3, auto_intervene=True)
    module.automatic_optimization = False
    heat(module.gpt)
    trainer = make([callback], max_steps=8)  # Lightning counts each optimizer's
    trainer.fit(module, loader())
    assert [snapshot.step for snapshot in callback.monitor.history] == [3] and callback.monitor.step == 4
    assert [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers] == [5e-4, 5e-4]


def test_lightnings_older_name_beside_the_new_one_and_alone(make, monkeypatch):
    older = pytest.importorskip("pytorch_lightning")
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.delitem(sys.modules, "hnf_attention.integrations.lightning")
    alone = importlib.import_module("hnf_attention.integrations.lightning")
    assert issubclass(alone.AttentionStabilityCallback, older.Callback)
    monkeypatch.undo()

    class Older(older.LightningModule):
        def __init__(self):
            super().__init__()
            self.gpt = tiny_gpt2(256)

        def training_step(self, batch, index):
            return self.gpt(batch, labels=batch).loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    for Callback in (AttentionStabilityCallback, alone.AttentionStabilityCallback):
        callback = Callback()
        make([callback], package="pytorch_lightning", logger=False).fit(Older(), loader())
        assert callback.last_diagnosis.step == 6
