"""Checks that the attention functions and the merge share. Errors say what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def expected(wanted: str, got: object, error: type[Exception] = ValueError) -> Exception:
    """The error that says so."""
    return error(f"expected {wanted}, got {got}")


def check_dense(name: str, tensor: object, or_none: str = "") -> None:
    """Raise TypeError for anything but a dense tensor."""
    if not isinstance(tensor, Tensor):
        raise expected(f"{name} to be a torch.Tensor{or_none}", type(tensor).__name__, TypeError)
    # A nested tensor has no shape to ask for, and a sparse one no strides.
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "a nested tensor" if tensor.is_nested else f"one of layout {tensor.layout}"
        raise expected(f"{name} to be a dense tensor", kind, TypeError)


def check_sinks(sinks: Tensor, rows: Tensor) -> None:
    """Raise TypeError or ValueError unless `sinks` (H,) fit `rows` (B, H, ...)."""
    check_dense("sinks", sinks, " or None")
    heads = rows.shape[1]
    if sinks.shape != (heads,):
        raise expected(f"sinks of shape (heads,) = ({heads},)", tuple(sinks.shape))
    if sinks.dtype not in FLOAT_DTYPES:
        raise expected("sinks of a floating dtype", sinks.dtype, TypeError)
    if sinks.device != rows.device:
        raise expected(f"sinks on the query's device {rows.device}", sinks.device)
