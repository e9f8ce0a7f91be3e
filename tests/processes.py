"""Start processes for tests of torch.distributed."""

import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

#: Imported once, by the server that the processes are forked from. A new interpreter takes seconds for each of them.
IMPORTED = [
    "hnf_attention",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.experimental",
    "torch.distributed.tensor.parallel",
    "torch.nn.parallel",
    "transformers",
]

needs_gloo = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs torch.distributed with gloo",
)


def start(function: Callable[..., Any], arguments: tuple[Any, ...], count: int) -> None:
    """Run `function(rank, *arguments)` in so many processes, and wait for them. Raises what one of them raised."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    torch.multiprocessing.start_processes(function, arguments, count, start_method="forkserver")


def by_scenario(folder: Path, count: int) -> dict[str, list[Any]]:
    """By scenario, what each of so many processes found: each left it in a pickle of its number."""
    each = [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(count)]
    return {name: [process[name] for process in each] for name in each[0]}
