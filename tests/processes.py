"""Start processes for tests of torch.distributed."""

import multiprocessing
from collections.abc import Callable
from typing import Any

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


def start(function: Callable[..., Any], arguments: tuple[Any, ...], count: int) -> None:
    """Run `function(rank, *arguments)` in so many processes, and wait for them. Raises what one of them raised."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    torch.multiprocessing.start_processes(function, arguments, count, start_method="forkserver")
