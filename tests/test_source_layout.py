"""The sources keep to the layout: no circle of imports, short files, few parameters."""

import shutil
import subprocess
from pathlib import Path

import pytest
from source_layout import circle, files, functions, imports, modules, num_parameters

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "kernels").is_dir():
    pytest.skip("the sources are in the checkout only", allow_module_level=True)

MAX_LINES, MAX_PARAMETERS, MAX_FLAT_FILES = 400, 16, 8


def test_no_module_imports_itself_by_way_of_others():
    assert circle(ROOT) == []


def test_files_are_short():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files(ROOT)}
    assert {str(path): number for path, number in lengths.items() if number > MAX_LINES} == {}


@pytest.mark.slow  # it parses every file
def test_functions_take_few_parameters():
    many = {x.name: str(p) for p in files(ROOT) for x in functions(p) if num_parameters(x) > MAX_PARAMETERS}
    assert many == {}


def test_few_files_lie_flat_in_the_package():
    assert len(list((ROOT / "hnf_attention").glob("*.py"))) <= MAX_FLAT_FILES


def write(root, sources):
    for name, text in sources.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


PACKAGE = {"hnf_attention/__init__.py": "", "hnf_attention/a/__init__.py": "", "kernels/k.py": ""}
PLANTED = {
    "for type checkers": {
        "hnf_attention/a/x.py": "from .y import Y\n",
        "hnf_attention/a/y.py": "if TYPE_CHECKING:\n    from hnf_attention.a import x\n",
    },
    "in a function": {
        "hnf_attention/b.py": "import hnf_attention.kernels.k\n",
        "kernels/k.py": "def f():\n    from ..b import B\n",
    },
    "by way of a package": {
        "hnf_attention/a/__init__.py": "from .x import X\n",
        "hnf_attention/a/x.py": "from . import X\n",
    },
}


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED)
def test_a_planted_circle_is_found(planted, tmp_path):
    write(tmp_path, PACKAGE)
    assert circle(tmp_path) == []
    write(tmp_path, planted)
    found = circle(tmp_path)
    assert found[0] == found[-1] and len(found) == 3


def test_imports_are_those_of_modules_where_names_are_modules(tmp_path):
    write(tmp_path, PACKAGE | {"hnf_attention/a/x.py": "from . import y, Z\nfrom .. import a\nimport os\n"})
    write(tmp_path, {"hnf_attention/a/y.py": "from ..kernels import k\n"})
    known = modules(tmp_path)
    assert imports("hnf_attention.a.x", known["hnf_attention.a.x"], known) == {
        "hnf_attention.a",
        "hnf_attention.a.y",
    }
    assert imports("hnf_attention.a.y", known["hnf_attention.a.y"], known) == {"hnf_attention.kernels.k"}


def layers(root):
    """Exit code and output of CI's check of the layers, for a checkout."""
    done = subprocess.run(["bash", str(root / ".ci" / "layers")], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def checkout(tmp_path):
    """A copy of the package and of what CI checks it by."""
    if shutil.which("lint-imports") is None:
        pytest.skip("import-linter is not installed")
    for name in ("hnf_attention", "kernels", ".ci"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_layers_are_kept(checkout):
    code, said = layers(checkout)
    assert code == 0, said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "line", "said"),
    [
        (
            "hnf_attention/statistics/rows.py",
            "from ..engine import api",
            "statistics is not allowed to import",
        ),
        (
            "hnf_attention/diagnosis/judge.py",
            "from ..reference import masks",
            "diagnosis is not allowed to import",
        ),
        (
            "hnf_attention/errors.py",
            "from . import names\nfrom .cli import main",
            "errors is not allowed to import",
        ),
        ("hnf_attention/engine/call.py", "if TYPE_CHECKING:\n    from . import api", "No circles BROKEN"),
        ("hnf_attention/extra/__init__.py", "", "not listed as layers"),
    ],
)
def test_an_import_against_the_layers_is_refused(checkout, module, line, said):
    path = checkout / module
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(f"\n{line}\n")
    code, found = layers(checkout)
    assert code == 1 and said in " ".join(found.split()), found
