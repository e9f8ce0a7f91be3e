"""Folders and files as people have them by mistake, and what each command says to them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

WORDS = "the cat sat on the mat and the dog lay on the rug while it rained"


def make(root: Path) -> None:
    """Write everything that `ANALYZE`, `CHECK` and the others name, into the folder."""
    (root / "text.txt").write_text(f"{WORDS} " * 40)
    (root / "short.txt").write_text("the cat")
    (root / "empty.txt").write_text(" \n")
    (root / "binary.txt").write_bytes(b"the\0cat")
    (root / "utf16.txt").write_bytes(WORDS.encode("utf-16"))
    (root / "foreign.txt").write_text("zum Beispiel deutsch " * 100)
    (root / "file").write_text("")
    _configurations(root)
    _models(root)


def _configurations(root: Path) -> None:
    good = {"d_model": 128, "n_heads": 8, "seq_len": 256}
    changes = {
        "good": {},
        "no_width": {"d_model": None},
        "no_length": {"seq_len": None},
        "uneven": {"d_model": 130},
        "negative": {"n_heads": -8},
        "text": {"d_model": "wide"},
        "fraction": {"n_heads": 2.5},
        "list": {"n_layers": [1]},
        "nan": {"init_std": float("nan")},
        "infinite": {"scale": float("inf")},
        "kv_heads": {"n_kv_heads": 3},
        "format": {"dtype": "int3"},
        "window": {"window": 0},
        "huge": {"scale": 10**400},
        "deepest": {"n_layers": 10**30},
    }
    typed = {
        "deepest_gemma": {"model_type": "gemma2", "num_hidden_layers": 10**10},
        "mamba": {"model_type": "mamba", "hidden_size": 64},
        "unknown": {"model_type": "lama"},
        "number": {"model_type": 7},
        "wrong": {"model_type": "llama", "hidden_size": "wide"},
    }
    for name, numbers in {**{name: good | change for name, change in changes.items()}, **typed}.items():
        (root / f"{name}.json").write_text(json.dumps(numbers))
    (root / "broken.json").write_text("{")
    (root / "array.json").write_text("[1]")
    (root / "bytes.json").write_bytes(b"\xff\xfe{}")
    (root / "deep.json").write_text("[" * 100_000)


def _models(root: Path) -> None:
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config, ViTConfig

    words = {word: number for number, word in enumerate(sorted(set(WORDS.split())))}
    tokenizer = Tokenizer(models.WordLevel(words | {"[UNK]": len(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")

    def folder(name: str, model=None) -> Path:
        (root / name).mkdir()
        if model is not None:
            model.save_pretrained(root / name)
        fast.save_pretrained(root / name)
        return root / name

    def llama(vocab_size: int = 32, layers: int = 1) -> LlamaForCausalLM:
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=layers,
                num_attention_heads=2,
                max_position_embeddings=64,
            )
        )

    folder("plain", llama())
    folder("few_words", llama(vocab_size=4))
    cut = folder("cut", llama()) / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:3000])
    tail = folder("cut_at_the_end", llama()) / "model.safetensors"
    tail.write_bytes(tail.read_bytes()[:-100])
    (folder("no_weights", llama()) / "model.safetensors").unlink()
    pickled = folder("pickled", llama())
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(b"PK\x03\x04 not a checkpoint")
    partial = folder("partial", llama()) / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(partial).items() if "self_attn" not in name}
    save_file(kept, partial, metadata={"format": "pt"})
    broken = llama()
    with torch.no_grad():
        broken.model.layers[0].self_attn.q_proj.weight[0, 0] = torch.nan
    folder("nan", broken)
    llama().save_pretrained(root / "no_tokenizer")
    (folder("bad_tokenizer", llama()) / "tokenizer.json").write_text("{")
    (folder("lost_tokenizer", llama()) / "tokenizer.json").unlink()
    own = {"model_type": "own", "auto_map": {"AutoConfig": "code.Own"}}
    (folder("own_code") / "config.json").write_text(json.dumps(own))
    (folder("bad_config") / "config.json").write_text("{")
    (folder("no_type") / "config.json").write_text("{}")
    (folder("unknown_type") / "config.json").write_text('{"model_type": "lama"}')
    ViTConfig(hidden_size=32, num_attention_heads=2).save_pretrained(folder("vision"))
    T5Config(d_model=32, d_ff=32, num_layers=1, num_heads=2).save_pretrained(folder("t5"))
    (folder("weights_only") / "pytorch_model.bin").write_bytes(b"")
    (folder("pipeline") / "model_index.json").write_text("{}")
    adapter = {
        "peft_type": "LORA",
        "base_model_name_or_path": "org/base",
        "r": 4,
        "target_modules": ["q_proj"],
    }
    (folder("adapter") / "adapter_config.json").write_text(json.dumps(adapter))
    (root / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    (root / "empty").mkdir()


# What follows the command -> part of the error. The folders and files are those of `make`.
ANALYZE = {
    "": "the following arguments are required: MODEL",
    "plain --text text.txt --window 0": "expected an integer of at least 1, got '0'",
    "plain --text text.txt --window many": "expected an integer of at least 1, got 'many'",
    "plain --text text.txt --window 99": "expected --window of at most 64, the length of plain, got 99",
    "plain --text text.txt --window 3": "expected --window of at least",
    "plain --text text.txt --batch-size -2": "expected an integer of at least 1, got '-2'",
    "plain --text text.txt --max-windows 1.5": "expected an integer of at least 1, got '1.5'",
    "plain --text text.txt --dtype float8": "invalid choice: 'float8'",
    "plain --text text.txt --device abacus": "expected --device cpu, cuda, cuda:N or mps, got abacus",
    "plain --text text.txt --device meta": "expected --device cpu, cuda, cuda:N or mps, got meta",
    "plain --text text.txt --device cuda:99": "expected a CUDA device for --device cuda:99, got a machine with ",
    "plain --text text.txt --device cpu --device-map auto": "expected one of --device and --device-map, got both",
    "plain --text text.txt --device-map nowhere": "cannot load the model of plain: ",
    "plain --text text.txt --attn-implementation magic": "cannot load the model of plain: ",
    "plain --text text.txt --revision main": "expected --revision for a name on the Hugging Face hub",
    "plain --text text.txt --threshold low_entropy": "expected --threshold NAME=VALUE, got low_entropy",
    "plain --text text.txt --threshold low_entropi=0.1": "got 'low_entropi'; the nearest are low_entropy",
    "plain --text text.txt --threshold low_entropy=low": "expected a number",
    "plain --text text.txt --threshold low_entropy=nan": "to be a finite number, got nan",
    "plain --text text.txt --threshold low_entropy=1 --threshold low_entropy=2": "twice",
    "plain --text text.txt --fail-on note": "invalid choice: 'note'",
    "plain --text text.txt --figures file": "cannot write to file",
    "plain --text text.txt --figures -": "expected a folder, got - ",
    "plain --text text.txt --json text.txt": "expected --json to be another file than the one that is read, got",
    "plain --text text.txt --json nowhere/a.json": "expected --json in an existing folder",
    "plain --text text.txt --json empty": "expected --json to be a file that can be written",
    "plain --text text.txt --speed 9": "unrecognized arguments: --speed 9",
    "plain --text missing.txt": "cannot read the text missing.txt: No such file or directory",
    "plain --text empty": "cannot read the text empty: Is a directory",
    "plain --text empty.txt": "expected some text in empty.txt, got an empty file",
    "plain --text binary.txt": "expected text in binary.txt, got a binary file",
    "plain --text utf16.txt": "expected UTF-8 text in utf16.txt, got other bytes at offset 0",
    "plain --text short.txt": "got 2; give a longer --text or a smaller --window",
    "plain --text foreign.txt": "expected a tokenizer that knows foreign.txt, got 300 unknown of 300 tokens",
    "./nowhere --text text.txt": "got ./nowhere: no such folder",
    "a/b/c --text text.txt": "got a/b/c: no such folder",
    "file --text text.txt": "got the file file: give the folder that holds it",
    "nowhere --text text.txt": "got nowhere: there is no such folder, the hub cannot be reached",
    "org/nowhere --text text.txt": "got org/nowhere: there is no such folder, the hub cannot be reached",
    "no/such!name --text text.txt": "no/such!name",
    "adapter --text text.txt": "is an adapter (LoRA or the like), not a whole model",
    "pipeline --text text.txt": "is a pipeline of several models; give the folder of one",
    "weights_only --text text.txt": "expected config.json of a Hugging Face model in the folder weights_only, got ",
    "empty --text text.txt": "expected config.json of a Hugging Face model in the folder empty, got an empty folder",
    "bad_config --text text.txt": "cannot load the configuration of bad_config",
    "no_type --text text.txt": "cannot load the configuration of no_type",
    "unknown_type --text text.txt": "cannot load the configuration of unknown_type",
    "vision --text text.txt": "expected a causal or masked language model, got vision (vit), which has no vocabulary",
    "t5 --text text.txt": "got the encoder-decoder t5 (t5)",
    "no_tokenizer --text text.txt": "expected a tokenizer beside the model in no_tokenizer, got none; save it there",
    "bad_tokenizer --text text.txt": "cannot load the tokenizer of bad_tokenizer: a file is damaged or cut short",
    "lost_tokenizer --text text.txt": "cannot load the tokenizer of lost_tokenizer: expected its vocabulary in",
    "own_code --text text.txt": "of own_code: it needs code of its own, which is not run from here",
    "few_words --text text.txt": "for a vocabulary of 4",
    "cut --text text.txt": "cannot load the model of cut: a file is damaged or cut short",
    "cut_at_the_end --text text.txt": "cannot load the model of cut_at_the_end: a file is damaged or cut short",
    "pickled --text text.txt": "cannot load the model of pickled: ",
    "no_weights --text text.txt": "cannot load the model of no_weights",
    "partial --text text.txt": "got a checkpoint without 4 of them",
}
CHECK = {
    "": "the following arguments are required: CONFIG_OR_MODEL",
    "good.json more": "got more: there is no such folder",
    "x" * 300: f"got {'x' * 80}... (300 characters): File name too long",
    f"good.json --json {'x' * 300}": "(300 characters): File name too long",
    "good.json --seq-len 0": "expected an integer of at least 1, got '0'",
    "good.json --seq-len 99999999999999999999": "expected an integer of at least 1",
    "good.json --dtype int3": "expected a dtype among",
    "good.json --weights": "expected a model's folder or name for --weights, got the file good.json",
    "good.json --fail-on never": "invalid choice: 'never'",
    "good.json --region r.xyz": "expected --region to end in one of .",
    "good.json --region r": "expected --region to end in one of .",
    "good.json --region - --json -": "expected --json and --region in two places, got standard output for both",
    "good.json --json ./good.json": "expected --json to be another file than the one that is read",
    "good.json --region nowhere/r.png": "expected --region in an existing folder",
    "good.json --json nowhere/a.json": "expected --json in an existing folder",
    "good.json --json empty": "expected --json to be a file that can be written",
    "missing.json": "cannot read the configuration missing.json: No such file or directory",
    "broken.json": "expected a JSON configuration in broken.json",
    "array.json": "expected a JSON object in array.json, got a list",
    "bytes.json": "expected a JSON configuration in bytes.json",
    "deep.json": "expected a JSON configuration in deep.json",
    "no_width.json": "expected d_model in the configuration, got none of d_model, hidden_size",
    "no_length.json": "give --seq-len",
    "uneven.json": "n_heads to divide d_model, got 8 heads and d_model 130",
    "negative.json": "expected n_heads to be an integer of at least 1, got -8",
    "text.json": "expected d_model to be an integer of at least 1, got 'wide'",
    "fraction.json": "expected n_heads to be an integer of at least 1, got 2.5",
    "deepest.json": "expected at most 10,000 layers in n_layers, got 1,000,000,000,000,",
    "deepest_gemma.json": "expected at most 10,000 layers in num_hidden_layers, got 10,000,000,000",
    "list.json": "expected n_layers to be an integer of at least 1, got [1]",
    "nan.json": "expected init_std to be a finite number above 0, got nan",
    "infinite.json": "expected scale to be a finite number above 0, got inf",
    "kv_heads.json": "expected n_kv_heads to divide the 8 heads, got 3",
    "format.json": "expected a dtype among",
    "window.json": "expected window to be an integer of at least 1, got 0",
    "huge.json": "huge.json: a number is too large",
    "mamba.json": "expected n_heads in the configuration, got none of n_heads",
    "unknown.json": "got 'lama'; did you mean llama?",
    "number.json": "expected a model_type that transformers",
    "wrong.json": "wrong.json",
    "./nowhere": "got ./nowhere: no such folder",
    "nowhere": "got nowhere: there is no such folder, the hub cannot be reached",
    "adapter": "is an adapter (LoRA or the like), not a whole model",
    "pipeline": "is a pipeline of several models",
    "weights_only": "expected config.json of a Hugging Face model in the folder weights_only",
    "empty": "expected config.json of a Hugging Face model in the folder empty, got an empty folder",
    "bad_config": "cannot load the configuration of bad_config",
    "unknown_type": "cannot load the configuration of unknown_type",
    "cut --weights": "cannot load the model of cut: a file is damaged or cut short",
    "no_weights --weights": "cannot load the model of no_weights",
    "partial --weights": "got a checkpoint without 4 of them",
    "nan --weights": "expected finite weights in nan, got NaN or infinity in 1 of its tensors, the first is model.",
}
DEMO = {
    "--steps 3": "expected at least 20 steps, got 3",
    "--steps 0": "expected an integer of at least 1, got '0'",
    "--steps ten": "expected an integer of at least 1, got 'ten'",
    "--seed x": "expected an integer from 0",
    "--seed -1": "expected an integer from 0",
    "--seed 99999999999999999999": "expected an integer from 0",
    "--device abacus": "expected --device cpu, cuda, cuda:N or mps, got abacus",
    "--device cuda:99": "expected a CUDA device for --device cuda:99",
    "--out -": "argument --out: expected a folder, got - (./- is a folder of that name)",
    "--out file": "cannot write to file",
    "--out file/below": "cannot write to file/below",
    "--json nowhere/a.json": "expected --json in an existing folder",
    "--json empty": "expected --json to be a file that can be written",
    "--quick --steps 3": "expected at least 20 steps, got 3",
    "--fast": "unrecognized arguments: --fast",
    "more": "unrecognized arguments: more",
    "--out": "argument --out: expected one argument",
}
DOCTOR = {
    "--json nowhere/a.json": "expected --json in an existing folder",
    "--json empty": "expected --json to be a file that can be written",
    "--json": "argument --json: expected one argument",
    "--json=": "expected --json to be a file that can be written",
    "--fast": "unrecognized arguments: --fast",
    "gpu": "unrecognized arguments: gpu",
}
NO_COMMAND = {
    "dance": "invalid choice: 'dance' (choose from ",
    "--verbose": "unrecognized arguments: --verbose",
    "--json a.json doctor": "",
    "Check good.json": "invalid choice: 'Check'",
    "report empty -o page.html": "expected a run log, got the folder empty",
    "watch empty --once": "expected a run log, got the folder empty",
    f"trace {'x' * 300}": "(300 characters): File name too long",
    f"analyze {'x' * 300}": "(300 characters): File name too long",
}
COMMANDS = {"analyze": ANALYZE, "check": CHECK, "demo": DEMO, "doctor": DOCTOR, "": NO_COMMAND}
CASES = [
    (f"{command} {arguments}".strip(), said)
    for command, cases in COMMANDS.items()
    for arguments, said in cases.items()
]
