"""Which options the quick suite must launch each kernel with, and the check at its end that it did."""

from ast import literal_eval
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from interpreter import dtype, leaves, record_launches

FLOATS = frozenset({"float32", "float16"})  # the interpreter has no products of bf16 matrices

#: Kernels, and the dtypes of tensors that each must be launched with.
KERNELS: dict[str, frozenset[str]] = {
    "forward_kernel": FLOATS,
    "huge_rows_kernel": FLOATS,
    "probe_kernel": FLOATS,
    "join_kernel": frozenset({"float32"}),
    "prepare_rows_kernel": FLOATS,
    "dq_kernel": FLOATS,
    "dkv_kernel": FLOATS,
    "fold_kernel": FLOATS | {"bfloat16"},
    "columns_kernel": FLOATS,
    "extremes_kernel": FLOATS,
    "longest_kernel": FLOATS,
    "size_bounds_kernel": frozenset({"float32"}),
    "largest_rows_kernel": FLOATS,
    "settle_kernel": frozenset({"float32", "uint8"}),
    "scaled_kernel": FLOATS,
    "single_extremes_kernel": FLOATS,
    "beside_kernel": frozenset({"float32"}),
    "rows_asked_kernel": frozenset({"float32", "uint8"}),  # rows that do not count are read as bytes
    "scan_mask_kernel": frozenset({"uint8", "float32"}),  # boolean masks are read as bytes
    "bounds_kernel": frozenset({"int32", "int64"}),
    "places_kernel": frozenset({"int32", "int64"}),
    "mask_rows_kernel": frozenset({"int32", "uint8"}),
    "mask_kernel": frozenset({"int32"}),
}
#: Kernels that only a test launches.
OF_TESTS = frozenset({"list_blocks", "list_spans"})
#: Kernel and option: the value that no caller can ask for.
IMPOSSIBLE: dict[tuple[str, str], bool] = {
    (
        "dkv_kernel",
        "has_d_scores",
    ): True,  # the gradient of a mask is written once, beside that of the queries
    ("scan_mask_kernel", "has_mask"): False,
    ("places_kernel", "is_packed"): False,
    ("mask_kernel", "has_mask"): False,
    ("mask_kernel", "is_packed"): True,
    ("longest_kernel", "has_padding"): True,  # it reads every row
    # Each of the two is the other's case.
    ("extremes_kernel", "single"): True,
    ("single_extremes_kernel", "single"): False,
    # It knows no output, and its scores are scale * q.k alone.
    ("largest_rows_kernel", "has_bias"): True,
    ("largest_rows_kernel", "has_out"): True,
    ("largest_rows_kernel", "has_softcap"): True,
    ("largest_rows_kernel", "single"): False,
}
# The sm_90 forward takes none of these.
IMPOSSIBLE |= {
    (kernel, option): True
    for kernel in ("places_kernel", "mask_kernel")
    for option in ("has_softcap", "has_bias")
}
IMPOSSIBLE |= {("places_kernel", "has_mask"): True}
# It corrects the sm_90 forward, which takes none of these.
IMPOSSIBLE |= {
    ("huge_rows_kernel", option): True
    for option in (
        "has_bias",
        "has_softcap",
        "extended",
        "natural",
        "pointers",
    )
}

Seen = Mapping[str, Mapping[str, set]]


def missing(seen: Seen) -> list[str]:
    """A line for each kernel, dtype and compile-time choice that was not launched.

    A choice is any boolean among a kernel's constants; a launch must have been seen with it and one without it.
    """
    found = [f"{kernel} is not in KERNELS" for kernel in sorted(seen.keys() - KERNELS.keys())]
    for kernel, dtypes in KERNELS.items():
        if kernel not in seen:
            found.append(f"{kernel} was not launched")
            continue
        for name in sorted(dtypes - seen[kernel]["dtype"]):
            found.append(f"{kernel} was not launched with dtype={name}")
        for option, values in sorted(seen[kernel].items()):
            absent = {False, True} - values if option != "dtype" else set()
            found += [
                f"{kernel} was not launched with {option}={value}"
                for value in sorted(absent)
                if IMPOSSIBLE.get((kernel, option)) is not value
            ]
    return found


class LaunchedOptions:
    """Fails a run of the whole quick suite that leaves an option of a kernel out."""

    def __init__(self) -> None:
        self.seen: defaultdict[str, defaultdict[str, set]] = defaultdict(lambda: defaultdict(set))
        self.whole = True
        self.missing: list[str] = []
        record_launches(self.add)

    def add(self, kernel: str, arguments: dict[str, Any]) -> None:
        kernel = kernel.lstrip("_")
        if kernel in OF_TESTS:
            return
        options = self.seen[kernel]
        for argument, value in arguments.items():
            for name, leaf in leaves(argument, value):
                if dtype(leaf) is not None:
                    options["dtype"].add(str(dtype(leaf)).removeprefix("torch."))
                elif isinstance(leaf, bool):
                    options[name].add(leaf)

    def pytest_deselected(self, items: Iterable[pytest.Item]) -> None:
        self.whole &= all("slow" in item.keywords for item in items)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        config = session.config
        if hasattr(config, "workeroutput"):  # a worker of pytest-xdist sees a part of the suite
            launched = {kernel: dict(options) for kernel, options in self.seen.items()}
            config.workeroutput["launched"] = repr((self.whole, launched))
            return
        self.whole &= config.args_source is config.ArgsSource.TESTPATHS
        if self.whole and not session.testsfailed and not config.option.collectonly:
            self.missing = missing(self.seen)
            session.exitstatus = session.exitstatus or bool(self.missing)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        if "launched" not in node.workeroutput:  # it ended early
            return
        whole, launched = literal_eval(node.workeroutput["launched"])
        self.whole &= whole
        for kernel, options in launched.items():
            for name, values in options.items():
                self.seen[kernel][name] |= values

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.missing:
            terminalreporter.section("options of kernels that the quick suite left out")
            for line in self.missing:
                terminalreporter.write_line(line)
