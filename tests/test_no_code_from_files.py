"""No file that is read can run code: no pickle, no `eval`, no code of a model that was downloaded."""

import ast
from pathlib import Path

import pytest
import torch

from hnf_attention.cli.main import main

ROOT = Path(__file__).parents[1]
READERS_OF_CODE = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}


def problems(source):
    """What in this source runs code from a file, with line numbers."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [x.name for x in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [(node.lineno, name) for name in names if name.split(".")[0] in READERS_OF_CODE]
        if not isinstance(node, ast.Call):
            continue
        given = {x.arg: getattr(x.value, "value", None) for x in node.keywords}
        if given.get("trust_remote_code"):
            found.append((node.lineno, "trust_remote_code"))
        called = node.func
        if isinstance(called, ast.Name) and called.id in ("eval", "exec"):
            found.append((node.lineno, called.id))
        if not (isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name)):
            continue
        of, name = called.value.id, called.attr
        if (of, name) == ("torch", "load") and given.get("weights_only") is not True:
            found.append((node.lineno, "torch.load"))
        if of in ("np", "numpy") and name == "load" and given.get("allow_pickle") is not False:
            found.append((node.lineno, "numpy.load"))
    return found


@pytest.mark.slow
def test_the_package_reads_safetensors_json_and_sqlite_alone():
    places = [ROOT / name for name in ("hnf_attention", "kernels", "bench", "examples")]
    files = [file for place in places if place.is_dir() for file in place.rglob("*.py")]
    found = {str(file.relative_to(ROOT)): problems(file.read_text(encoding="utf-8")) for file in files}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "model = load(name, trust_remote_code=True)",
    ],
)
def test_what_runs_code_is_found(line):
    assert problems(line)


def test_what_runs_none_is_not():
    safe = "torch.load(p, weights_only=True); np.load(p, allow_pickle=False); json.loads(t); model.eval()"
    assert not problems(f"{safe}; load(n, trust_remote_code=False)")


class Harm:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.slow
def test_a_pickle_in_a_models_folder_does_not_run(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(intermediate_size=32, **sizes))
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(model.state_dict() | {"x": Harm(tmp_path / "harm")}, tmp_path / "model" / "pytorch_model.bin")
    assert main(["check", str(tmp_path / "model"), "--weights"]) == 2
    assert not (tmp_path / "harm").exists()
    *_, said = capsys.readouterr().err.splitlines()
    assert (
        "cannot load the model" in said
        and "its pickle needs code of its own, which is not run from here" in said
    )
