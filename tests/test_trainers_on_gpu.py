"""Both trainers' callbacks on a card: a GPT-2 whose scores are far too large is treated, and goes on learning."""

import importlib
from importlib.util import find_spec

import pytest
import torch
from tiny_gpt2 import byte_windows, heat, tiny_gpt2

from hnf_attention.integrations import AttentionStabilityCallback

pytestmark = pytest.mark.gpu
PACKAGE = next(
    (name for name in ("lightning.pytorch", "pytorch_lightning") if find_spec(name.split(".")[0])), None
)
STEPS = 60


def hot():
    model = tiny_gpt2(256)
    heat(model)
    return model


def judge(callback, losses):
    """QK-clip ran, the largest scores fell below where heads are called unstable, and the loss fell."""
    tops = [max(layer.max_abs_logit.max() for layer in s.layers.values()) for s in callback.monitor.history]
    actions = [done.intervention["action"] for done in callback.monitor.applied]
    print(
        f"actions {actions}, largest scores {tops[0]:.0f} to {tops[-1]:.0f}, losses {losses[0]:.2f} to {losses[-1]:.2f}"
    )
    assert "qk_clip" in actions
    assert tops[0] > 500 and tops[-1] < 100
    assert losses[-1] < losses[0]


def test_transformers_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    windows = [{"input_ids": window, "labels": window} for window in byte_windows(64)]
    callback = AttentionStabilityCallback(log_every=5, auto_intervene=True)
    trainer = transformers.Trainer(
        model=hot(),
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path),
            report_to=[],
            disable_tqdm=True,
            max_steps=STEPS,
            logging_steps=5,
            learning_rate=1e-3,
            save_strategy="no",
            bf16=True,
        ),
        train_dataset=windows,
        callbacks=[callback],
    )
    trainer.train()
    assert next(trainer.model.parameters()).is_cuda
    judge(callback, [line["loss"] for line in trainer.state.log_history if "loss" in line])


@pytest.mark.skipif(PACKAGE is None, reason="needs Lightning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
def test_lightning_trainer(tmp_path):
    from hnf_attention.integrations.lightning import AttentionStabilityCallback

    lightning, losses = importlib.import_module(PACKAGE), []

    class Language(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.gpt = hot()

        def training_step(self, batch, index):
            loss = self.gpt(batch, labels=batch).loss
            losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    module, callback = Language(), AttentionStabilityCallback(log_every=5, auto_intervene=True)
    lightning.Trainer(
        default_root_dir=tmp_path,
        accelerator="cuda",
        devices=1,
        precision="bf16-mixed",
        max_steps=STEPS,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, torch.utils.data.DataLoader(byte_windows(8 * STEPS), batch_size=8))
    judge(callback, losses)
