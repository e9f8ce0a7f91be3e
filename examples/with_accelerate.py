"""Watch a training loop that Accelerate drives, and treat it: a tiny GPT-2 on bytes of Python's own library.

    accelerate launch examples/with_accelerate.py attention.jsonl

Needs `pip install "hnf-attention[trainer]"`. The query and key weights start out far too large, on purpose. The
monitor notices, scales them down, and halves the learning rate.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import GPT2Config, GPT2LMHeadModel, get_linear_schedule_with_warmup

from hnf_attention import AttentionStabilityMonitor, apply_intervention
from hnf_attention.integrations import JSONLWriter

LENGTH = 64


def main(arguments: argparse.Namespace) -> None:
    accelerator = Accelerator(cpu=arguments.cpu, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256,
        n_layer=2,
        n_embd=64,
        n_head=4,
        n_positions=LENGTH,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight[:, :128] *= 100.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = get_linear_schedule_with_warmup(optimizer, 2, arguments.steps)
    text = bytearray(Path(argparse.__file__).read_bytes())
    text = text[: len(text) // LENGTH * LENGTH]
    windows = torch.frombuffer(text, dtype=torch.uint8).view(-1, LENGTH).long()
    loader = torch.utils.data.DataLoader(windows, batch_size=4, shuffle=True)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    monitor = AttentionStabilityMonitor(
        accelerator.unwrap_model(model),  # so that layers have the names that people know
        log_every=arguments.log_every,
        writers=[JSONLWriter(arguments.out)] if accelerator.is_main_process else [],
    )
    while monitor.step < arguments.steps:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(batch, labels=batch).loss
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                # After the optimizer's step and before zero_grad; not while gradients are accumulated.
                if accelerator.sync_gradients:
                    watch(monitor, optimizer, scheduler, accelerator)
                optimizer.zero_grad()
            if monitor.step == arguments.steps:
                break
    monitor.restore()


def watch(monitor: AttentionStabilityMonitor, optimizer, scheduler, accelerator: Accelerator) -> None:
    diagnosis = monitor.on_step()  # None between log steps
    if diagnosis is None:
        return
    accelerator.print(
        f"step {diagnosis.step}: {len(diagnosis.errors)} errors, {len(diagnosis.warnings)} warnings"
    )
    intervention = monitor.get_intervention(diagnosis)
    # Several processes would each change their copy of the weights by their own statistics.
    if intervention and accelerator.num_processes == 1:
        done = apply_intervention(optimizer, intervention, scheduler=scheduler)
        print(f"    {done.description}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="file for the snapshots, one line of JSON each")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--log-every", type=int, default=5)
    parser.add_argument("--cpu", action="store_true", help="even if there is a GPU")
    main(parser.parse_args())
