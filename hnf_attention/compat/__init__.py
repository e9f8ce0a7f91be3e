"""Every private name of torch and transformers that this project uses, one function or constant each.

A private name may change in any release. Each entry therefore says what it answers, and what happens in a version
without it. The tests ran with torch 2.11 and 2.13 and with transformers 5. Importing this imports torch alone.
`tests/test_compat.py` shows which public behaviour each entry carries.

`dynamo` is imported by its own name: it holds what only torch.compile's tracer needs.
"""

from .torch import (
    Memory,
    any_autocast,
    child,
    copy_all,
    cudnn_backward,
    current_level,
    default_store,
    dispatch_modes,
    flash_backward,
    flattened,
    forward_hooks,
    forward_mode_enabled,
    fsdp_wrapped,
    functorch_transform,
    hooks,
    in_gradient_batch,
    inner_schedulers,
    jit_trace,
    kept_in,
    learned,
    lowered_graph,
    module_call_code,
    own_parameter,
    running_backward,
    runs_graph,
    script_as,
    script_no_longer,
    vmap_in_operators,
    without_dispatch_modes,
    without_forward_mode,
)
from .transformers import attention_implementation, collects_attention_weights, device_mesh, initialise

__all__ = [
    "Memory",
    "any_autocast",
    "attention_implementation",
    "child",
    "collects_attention_weights",
    "copy_all",
    "cudnn_backward",
    "current_level",
    "default_store",
    "device_mesh",
    "dispatch_modes",
    "flash_backward",
    "flattened",
    "forward_hooks",
    "forward_mode_enabled",
    "fsdp_wrapped",
    "functorch_transform",
    "hooks",
    "initialise",
    "in_gradient_batch",
    "inner_schedulers",
    "jit_trace",
    "kept_in",
    "learned",
    "lowered_graph",
    "module_call_code",
    "own_parameter",
    "running_backward",
    "runs_graph",
    "script_as",
    "script_no_longer",
    "vmap_in_operators",
    "without_dispatch_modes",
    "without_forward_mode",
]
