"""A fine-tune of the TRL kind: documents of ragged lengths end to end, through a trainer with our callback.

With trl, its SFTTrainer packs them. Without, transformers' Trainer does, with DataCollatorWithFlattening.
"""

from __future__ import annotations

import ast
import sysconfig
import tempfile
import warnings
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn

from hnf_attention import AttentionStabilityMonitor
from hnf_attention.integrations import AttentionStabilityCallback

from . import exact, loop
from .recipes import RECIPES, make

VOCABULARY = 1024
COMPARED = (
    "entropy",
    "normalized_entropy",
    "max_weight",
    "max_logit",
    "min_logit",
    "logit_range_max",
    "rows",
)


def documents(count: int) -> list[str]:
    """The sources of so many functions and classes of the standard library, from its files in name order."""
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.append(ast.get_source_segment(text, node) or "")
        if len(found) >= count:
            break
    return found[:count]


def tokenizer_of(texts: list[str]) -> transformers.PreTrainedTokenizerFast:
    """Byte-pair encoding, trained on these texts."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        texts, VOCABULARY - 1, show_progress=False, special_tokens=["<pad>"]
    )  # ids below VOCABULARY
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, pad_token="<pad>", eos_token="<pad>"
    )


class Packs:
    """The texts of a run, and a trainer that packs them.

    length: tokens of a pack. trl: whether SFTTrainer does it.
    """

    def __init__(self, device: torch.device, length: int, trl: bool):
        self.device, self.length, self.trl = device, length, trl
        tiny = device.type == "cpu"
        self.texts = [text[: length if tiny else None] for text in documents(60 if tiny else 600)]
        self.tokenizer = tokenizer_of(self.texts)
        self.tokens = [self.tokenizer(text)["input_ids"] for text in self.texts]
        self.folder = tempfile.TemporaryDirectory()

    def arguments(self) -> dict[str, Any]:
        return dict(
            output_dir=self.folder.name,
            max_steps=loop.STEPS,
            logging_steps=1,
            learning_rate=3e-4,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=self.device.type == "cpu",
            seed=0,
            data_seed=0,
        )

    def trainer(self, model: nn.Module, callbacks: list[Any]) -> transformers.Trainer:
        if self.trl:
            import datasets
            import trl

            datasets.disable_progress_bars()
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # it asks for FlashAttention; SDPA gets the packs' borders as a mask
                return trl.SFTTrainer(
                    model=model,
                    args=trl.SFTConfig(
                        **self.arguments(),
                        per_device_train_batch_size=1,
                        packing=True,
                        max_length=self.length,
                        gradient_checkpointing=False,
                        bf16=False,  # the weights are bf16 already
                    ),
                    train_dataset=datasets.Dataset.from_list([{"text": text} for text in self.texts]),
                    processing_class=self.tokenizer,
                    callbacks=callbacks,
                )
        return transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(
                **self.arguments(), per_device_train_batch_size=1, remove_unused_columns=False
            ),
            data_collator=_Flattening(),
            train_dataset=self._packed(),
            callbacks=callbacks,
        )

    def _packed(self) -> list[dict[str, Any]]:
        """Documents that fill a pack together, in their order; longer ones are cut."""
        packs: list[list[list[int]]] = [[]]
        for text in self.tokens:
            tokens = text[: self.length // 2]
            if sum(map(len, packs[-1])) + len(tokens) > self.length:
                packs.append([])
            packs[-1].append(tokens)
        return [{"documents": pack} for pack in packs[:-1]]

    def train(self, model: nn.Module, watched: bool) -> loop.Trained:
        callback = AttentionStabilityCallback(log_every=loop.CADENCE)
        trainer = self.trainer(model, [callback] if watched else [])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        if not watched:
            return loop.Trained(losses, model)
        monitor = callback.monitor
        found = loop.judged(monitor, callback.last_diagnosis)
        parts = {name: why for name, why in found[1].items() if "restore()" not in why}
        return loop.Trained(losses, model, found[0], parts, found[2])

    def batch(self, model: nn.Module) -> dict[str, Any]:
        """As the trainer gives it to the model, of the first packs the one of the most sequences."""
        first = islice(self.trainer(model, []).get_train_dataloader(), loop.STEPS)
        return max(first, key=lambda batch: int((batch["position_ids"] == 0).sum()))


class _Flattening:
    """DataCollatorWithFlattening over the documents of one pack."""

    def __init__(self) -> None:
        self._flatten = transformers.DataCollatorWithFlattening()

    def __call__(self, packs: list[dict[str, Any]]) -> dict[str, Tensor]:
        return self._flatten([{"input_ids": text} for pack in packs for text in pack["documents"]])


def run(device: torch.device, steps: int) -> dict[str, Any]:
    recipe, tiny = RECIPES["packs"], device.type == "cpu"
    trl = find_spec("trl") is not None
    packs = Packs(device, recipe.length[tiny], trl)
    batch = packs.batch(make(recipe, device, recipe.implementation, vocab_size=VOCABULARY))
    found = loop.compare(
        lambda implementation: make(recipe, device, implementation, vocab_size=VOCABULARY),
        packs.train,
        recipe.implementation,
        batch,
        steps,
    )
    found["trainer"] = "trl.SFTTrainer" if trl else "transformers.Trainer"
    found["sequences"] = int((batch["position_ids"] == 0).sum())
    found["alone"] = {
        implementation: alone(make(recipe, device, implementation, vocab_size=VOCABULARY).float(), batch)
        for implementation in (recipe.implementation, "hnf_attention")
    }
    return found


def alone(model: nn.Module, pack: dict[str, Any]) -> dict[str, float]:
    """How far a pack's statistics are from those of its sequences, each in a forward of its own; fp32."""
    tokens, positions = pack["input_ids"], pack["position_ids"]
    starts = (positions[0] == 0).nonzero().flatten().tolist() + [tokens.shape[1]]
    sequences = [tokens[:, a:b] for a, b in zip(starts, starts[1:])]
    together, rows = measured(model, [pack])
    apart, each = measured(model, [{"input_ids": x, "labels": x} for x in sequences])
    worst = dict.fromkeys((*COMPARED, *(f"row {name}" for name in exact.FIELDS)), 0.0)
    for layer, stats in together.items():
        for name in COMPARED:
            got, wanted = (torch.from_numpy(getattr(x, name)) for x in (stats, apart[layer]))
            worst[name] = max(worst[name], exact.difference(got, wanted))
        for name in exact.FIELDS:
            (got,) = (getattr(x, name) for x in rows[layer])
            wanted = torch.cat([getattr(x, name) for x in each[layer]], dim=2)
            worst[f"row {name}"] = max(worst[f"row {name}"], exact.difference(got, wanted))
    return worst


def measured(model: nn.Module, given: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """(head statistics of one reading over these forwards, the rows of each) by layer."""
    monitor = AttentionStabilityMonitor(model, log_every=1)
    record, rows = monitor.instrumentation.on_measure, {}

    def both(measurement: Any) -> None:
        rows.setdefault(measurement.layer, []).append(measurement.rows)
        record(measurement)

    monitor.instrumentation.on_measure = both
    try:
        for batch in given:
            model(**batch)  # under grad, as a training forward
        return monitor.on_step().stats, rows
    finally:
        monitor.restore()
