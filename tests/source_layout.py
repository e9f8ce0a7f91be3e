"""What the sources of a checkout look like: who imports whom, how long files are, how much functions take."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

#: Folders of a checkout that hold Python.
FOLDERS = ("hnf_attention", "kernels", "tests", "bench", "docs", "examples")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All statements in a node, at any depth. Expressions, of which there are ten times as many, hold none."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case)):
            yield child
            yield from statements(child)


def modules(root: Path) -> dict[str, Path]:
    """The package's modules by name; kernels/ is installed inside the package."""
    found = {}
    for folder, name in (("hnf_attention", "hnf_attention"), ("kernels", "hnf_attention.kernels")):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            found[".".join((name, *(part for part in parts if part != "__init__")))] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The known modules that a module imports anywhere: in functions and for type checkers too."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            # `from package import module` reads the module, and any other name the package.
            names = {f"{origin}.{alias.name}" for alias in node.names}
            found |= {x if x in known else origin for x in names}
    return (found & known.keys()) - {name}


def circle(root: Path) -> list[str]:
    """The modules of one circle of imports, the first one again at the end; empty without one."""
    known = modules(root)
    graph = {name: imports(name, path, known) for name, path in known.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def files(root: Path) -> Iterator[Path]:
    for folder in FOLDERS:
        yield from sorted((root / folder).rglob("*.py"))


def functions(path: Path) -> Iterator[Function]:
    for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, Function):
            yield node


def num_parameters(function: Function) -> int:
    taken = function.args
    named = [*taken.posonlyargs, *taken.args, *taken.kwonlyargs]
    return len(named) + (taken.vararg is not None) + (taken.kwarg is not None)
