"""`compat` is whole: every entry has a test, and no private name stands outside of it."""

import ast
import inspect
import sys
from pathlib import Path

import pytest

import hnf_attention
from hnf_attention import compat
from hnf_attention.compat import dynamo

#: Those with marks: compat's own, and tests of a behaviour that entries of it carry.
FILES = [f"test_compat{part}.py" for part in ("", "_dynamo", "_distributed", "_library")]
FILES += [
    "test_transforms.py",
    "test_transforms_of_models.py",
    "test_every_step_faults.py",
    "test_every_step_compiled.py",
    "test_torch_sdpa.py",
    "test_transformers_attention.py",
    "test_triage_slips.py",
]
HERE = Path(__file__).parent
PACKAGE = Path(hnf_attention.__file__).parent


def entries_with_a_test():
    """The entries that the marks `carried_by` name."""
    for name in FILES:
        for node in ast.walk(ast.parse((HERE / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "carried_by":
                yield from map(ast.literal_eval, node.args)


def test_every_entry_has_a_test():
    functions = {name for name, value in vars(dynamo).items() if inspect.isfunction(value)}
    methods = {name for name in vars(dynamo.Frame) if not name.startswith("_")}
    of_dynamo = {name for name in functions | methods if not name.startswith("_")} - {"child"}
    assert set(entries_with_a_test()) == {*compat.__all__, *of_dynamo}


def sources():
    """Every file of the package and of its kernels: (path, tree)."""
    folders = [PACKAGE, PACKAGE.parent / "kernels"]
    for path in sorted({path for folder in folders for path in folder.rglob("*.py")}):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


LOOKUPS = {"getattr", "hasattr", "setattr", "delattr", "import_module", "attrgetter", "_find"}


def private_names(tree):
    """Private attributes that are read, private modules that are imported, and either as text in a lookup."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            yield node.attr, node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in LOOKUPS:
            texts = (x.value for x in node.args if isinstance(x, ast.Constant) and isinstance(x.value, str))
            for part in ".".join(texts).split("."):
                if part.startswith("_"):
                    yield part, node.lineno
    for name in imports(tree):
        for part in name.split("."):
            if part.startswith("_"):
                yield part, 0


def own_names(tree):
    """Private names that the project gives: functions, classes, attributes, variables, parameters, slots."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def texts(tree, known):
    """Known private names that are a whole string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in known:
            yield node.value, node.lineno


OTHERS = {
    "_replace", "_asdict", "_fields",  # of Python's NamedTuple
    "_getframe",  # of Python's sys
    "_aggregate",  # of Triton 3.6, for kernels, which import nothing of this package
    "_batches_that_stepped",  # of Lightning, which has no public name for it
}  # fmt: skip


@pytest.mark.slow
def test_no_private_name_of_a_library_stands_outside_of_compat():
    trees = dict(sources())
    inside = {path: tree for path, tree in trees.items() if path.parent == PACKAGE / "compat"}
    known = {name for tree in inside.values() for name, _ in private_names(tree)}
    known -= {name for tree in inside.values() for name in own_names(tree)}
    own = {name for tree in trees.values() for name in own_names(tree)}
    found = [
        f"{path.relative_to(PACKAGE.parent)}:{line}: {name}"
        for path, tree in trees.items()
        if path not in inside
        for name, line in (*private_names(tree), *texts(tree, known))
        if not name.startswith("__") and (name in known or name not in own | OTHERS)
    ]
    assert not found, "\n".join(found)


def test_compat_imports_torch_alone():
    for path in (PACKAGE / "compat").glob("*.py"):
        statements = ast.parse(path.read_text(encoding="utf-8")).body
        names = set(imports(ast.Module(statements, []))) if path.name != "dynamo.py" else set()
        top = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
        assert top <= {"torch"}, path
        for statement in statements:
            if isinstance(statement, (ast.Import, ast.ImportFrom)):
                assert not any("_dynamo" in name for name in imports(ast.Module([statement], [])))
