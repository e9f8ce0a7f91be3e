"""Private names of torch that run with the model's calls.

A name that every call asks for is bound here to torch's own function, so that no Python frame lies around it.
"""

from __future__ import annotations

import functools
import inspect
import operator
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def _find(path: str, missing: Any) -> Any:
    """What torch has at `path`, or `missing` in a version without it."""
    try:
        return operator.attrgetter(path)(torch)
    except AttributeError:
        return missing


functorch_transform: Callable[[], bool] = _find("_C._are_functorch_transforms_active", lambda: False)
"""Whether a transform of torch.func (vmap, grad, ...) runs the call.

Missing: False. Measuring then fails on the transform's tensors, and coverage gives that as the reason.
"""

lowered_graph: Callable[[], object | None] = _find("_guards.TracingContext.try_get", lambda: None)
"""The graph that torch.compile lowers at this moment by running it; None outside of that.

Missing: None. Calls that Dynamo kept whole are then measured with the tensors of the lowering, which have no numbers.
"""

dispatch_modes: Callable[[], int] = _find("_C._len_torch_dispatch_stack", lambda: 0)
"""How many dispatch modes (selective checkpoints, FLOP counters, ...) see the operators of the call.

Missing: 0. Dispatch modes then see the operations of a measurement as if the model ran them.
"""

jit_trace: Callable[[], object | None] = _find(
    "_C._get_tracing_state", lambda: torch.jit.is_tracing() or None
)
"""The trace that torch.jit.trace records at this moment; None outside of one.

Missing: torch.jit.is_tracing answers, in two Python frames more.
"""

without_dispatch_modes: Callable[[], AbstractContextManager[Any]] = _find(
    "utils._python_dispatch._disable_current_modes", nullcontext
)
"""A context in which no dispatch mode sees the operators.

Missing: dispatch modes see them. A selective checkpoint then fails in its backward, for operators it did not count.
"""

DispatchMode: Any = _find("utils._python_dispatch.TorchDispatchMode", object)
"""The base class of a context whose `__torch_dispatch__` sees every operation. Missing: a trace raises TypeError."""

current_level: Callable[[], int] = functools.partial(getattr, torch.autograd.forward_ad, "_current_level", -1)
"""The level of forward-mode differentiation that the call is in, -1 outside of it.

Missing: -1. `attention()` under forward-mode differentiation then drops the tangents without an error.
"""

in_gradient_batch: Callable[[Tensor], bool] = _find(
    "_C._functorch.is_legacy_batchedtensor", lambda tensor: False
)
"""Whether a tensor stands for many, as in `torch.autograd.grad(is_grads_batched=True)`.

Missing: False. Gradients of attention() that are asked for in a batch then raise an error of PyTorch's.
"""

uses: Callable[[Tensor], int] = _find("Tensor._use_count", lambda tensor: 0)
"""How many parts of PyTorch hold a tensor: 1 for a gradient that autograd hands to one node and does not keep.

Missing: 0. `QKClip` within the step then writes gradients to new tensors.
"""

forward_mode_enabled: Callable[[], bool] = _find("_C._is_fwd_grad_enabled", lambda: True)
"""Whether forward-mode differentiation follows the operators of the call.

Missing: True. Measurements of a call in forward-mode differentiation are then computed by plain PyTorch.
"""

without_forward_mode: Callable[[bool], AbstractContextManager[Any]] = _find(
    "autograd.forward_ad._set_fwd_grad_enabled", nullcontext
)
"""Given False, a context in which forward-mode differentiation does not follow the operators.

Missing: it follows them. Measurements then carry tangents, which nothing reads.
"""

running_backward: Callable[[], int] = _find("_C._current_graph_task_id", lambda: -1)
"""The number of the backward pass that makes the call, -1 outside of one.

Missing: -1. The second forward of an activation checkpoint is then recorded like the first.
"""

next_node_number: Callable[[], int] = _find("_C._autograd._get_sequence_nr", lambda: -1)
"""The number that autograd gives to the next node that this thread makes in a forward.

Missing: -1. A trace then cannot say which module an operation of the backward belongs to.
"""

_running_node: Callable[[], Any] = _find("_C._current_autograd_node", lambda: None)


def running_node_number() -> int:
    """The number of the autograd node whose backward makes the call, -1 outside of one.

    Missing: -1. A trace then cannot say which module an operation of the backward belongs to.
    """
    node = _running_node()
    number: Callable[[], int] = getattr(node, "_sequence_nr", lambda: -1)
    return number()


def parameters_of(operator: Any) -> list[tuple[str, bool]]:
    """The name of each parameter of an operator of torch.ops, and whether a call writes to it.

    Missing: none. A trace then calls arguments by their places, and overlooks what an operation wrote in place.
    """
    schema = getattr(operator, "_schema", None)
    given = [] if schema is None else schema.arguments
    return [(x.name, x.alias_info is not None and x.alias_info.is_write) for x in given]


def version(tensor: Tensor) -> int:
    """How often the memory of a tensor was written to, as autograd counts it; 0 for tensors of inference mode.

    Missing: 0. A tensor that was overwritten since then counts as unchanged.
    """
    return 0 if tensor.is_inference() else getattr(tensor, "_version", 0)


_saving: Callable[[bool], Any] = _find("_C._autograd._top_saved_tensors_default_hooks", lambda _: None)


def saves_elsewhere() -> bool:
    """Whether what autograd saves now goes through hooks, as in a checkpoint, which keeps none of it.

    Missing: False. Tensors of a checkpoint may then be held until the end of the forward.
    """
    return _saving(False) is not None


_raw_stream: Callable[[int], int] = _find("_C._cuda_getCurrentRawStream", lambda _: 0)


def current_stream(device: torch.device) -> int:
    """The number of the current stream of a CUDA device, 0 on any other; quicker than `torch.cuda.current_stream`.

    Missing: 0. A model that runs layers on streams of its own may then be read too early.
    """
    return _raw_stream(device.index) if device.type == "cuda" else 0


any_autocast: Callable[[], bool] = _find("_C._is_any_autocast_enabled", lambda: True)
"""Whether autocast is on for some device; it leaves out MPS. Ten times cheaper than the question about one device.

Missing: True. Every call then asks about its own device.
"""

module_call_code: CodeType = getattr(nn.Module, "_call_impl", nn.Module.__call__).__code__
"""The code of the function that runs a module's hooks and its forward; its frame's local `self` is the module.

Missing: the code of `nn.Module.__call__`, which runs around it.
"""


def runs_graph(frame: FrameType) -> bool:
    """Whether the frame runs code that torch.fx generated of a graph, as backends of torch.compile may do.

    Missing: False. With backend="eager", attention in a compiled graph is then measured a second time.
    """
    return frame.f_code.co_filename.startswith("<eval_with_key>")


_KEPT = "_hnf_attention_invocation"


def kept_in(variables: dict[str, Any], make: Callable[[], Any]) -> Any:
    """An object that stays with the frame of one function call, made when it is first asked for.

    variables: `f_locals` of the frame. The object is one more item of it, which CPython keeps as long as the frame (the
    tests ran with 3.11). Missing: made anew each time. Each call of a layer then counts as an invocation of its own.
    """
    found = variables.get(_KEPT)
    if found is None:
        found = variables[_KEPT] = make()
    return found


cudnn_backward: Any = _find("ops.aten._scaled_dot_product_cudnn_attention_backward", None)
"""cuDNN's backward of attention. Missing: None, and FlashAttention's is used."""

flash_backward: Any = _find("ops.aten._scaled_dot_product_flash_attention_backward", None)
"""FlashAttention's backward of attention. Missing: None, and this project's own kernel is used."""

flash_operators = ("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward")
"""What scaled_dot_product_attention calls for its flash kernel, in `torch.ops.aten`: the forward and its backward.

Missing: `hnf_attention.integrations.torch_sdpa.activate` raises an error of PyTorch's.
"""

cudnn_enabled: Callable[[], bool] = _find("_C._get_cudnn_enabled", lambda: torch.backends.cudnn.enabled)
"""Whether the user lets PyTorch use cuDNN at all, `torch.backends.cudnn.enabled`.

Missing: the public property answers, at ten times the cost.
"""

other_flash: Callable[[], str | None] = _find("nn.attention.current_flash_attention_impl", lambda: None)
"""The version of FlashAttention that the user put in place of PyTorch's own, None for PyTorch's own.

torch 2.10 and earlier have no such choice. Missing: None, and PyTorch's own is expected.
"""


def vmap_in_operators() -> AbstractContextManager[Any]:
    """A context in which vmap works inside an operator that a compiled graph runs.

    Graphs of the default backend exclude the dispatch keys of vmap from their operators. Missing: they stay excluded.
    Measuring a compiled flex_attention call with functions over its scores then fails, and coverage says so.
    """
    try:
        excluded = torch._C._dispatch_tls_local_exclude_set()
        for name in ("FuncTorchBatched", "FuncTorchDynamicLayerFrontMode", "FuncTorchDynamicLayerBackMode"):
            excluded -= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
        return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)
    except AttributeError:
        return nullcontext()


def child(module: nn.Module, name: str) -> nn.Module | None:
    """The child module of that name, None where there is none; no property of the class is run.

    Missing: looked up among the named children, where a child with two names has the first one only.
    """
    children = getattr(module, "_modules", None)
    return (dict(module.named_children()) if children is None else children).get(name)


def fsdp_wrapped(module: nn.Module) -> str | None:
    """The name of the child that FullyShardedDataParallel put this module around; None for any other module.

    Missing: None. The names of layers then contain FSDP's own.
    """
    name = "_fsdp_wrapped_module"
    return name if type(module).__name__ == "FullyShardedDataParallel" and child(module, name) else None


def own_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter that the module itself registered under that name; parametrisations compute theirs anew.

    Missing: looked up among the named parameters, where a parameter with two names has the first one only.
    """
    parameters = getattr(module, "_parameters", None)
    return (dict(module.named_parameters(recurse=False)) if parameters is None else parameters).get(name)


def hooks(module: nn.Module) -> list[Any]:
    """The collections in which the module itself keeps hooks of all kinds.

    Missing: []. A trial of a layer's weights then runs the hooks that its copy has taken over.
    """
    names = [name for name in vars(nn.Module()) if name.endswith("_hooks")]
    return [vars(module)[name] for name in names if name in vars(module)]


def forward_hooks(module: nn.Module) -> list[Any]:
    """The hooks that run around the module's forward and may change what it takes or returns.

    Missing: []. The weights of a projection with such a hook are then scaled as if there were none.
    """
    kept = (getattr(module, name, {}) for name in ("_forward_pre_hooks", "_forward_hooks"))
    return [hook for hooks in kept for hook in hooks.values()]


def splits_module(hook: Any) -> bool:
    """Whether a hook is one by which `parallelize_module` splits a module over processes.

    It puts its inputs and outputs into DTensors, and takes them out. Missing: False. QK-clip then refuses such layers.
    """
    return getattr(hook, "__module__", None) == "torch.distributed.tensor._api"


def learned(tensor: Tensor) -> bool:
    """Whether the tensor is a parameter or a view of one, as its transpose is. Missing: views of one count as none."""
    return isinstance(tensor, nn.Parameter) or isinstance(getattr(tensor, "_base", None), nn.Parameter)


class Memory:
    """Where the numbers of a tensor lie. Once it was freed, the memory may be given to another tensor.

    Missing: it never counts as freed. A softmax may then be taken for the factor of a product that it is not.
    """

    __slots__ = ("_storage", "address")

    def __init__(self, tensor: Tensor):
        storage = tensor.untyped_storage()
        self.address: int = storage.data_ptr()
        kind = _find("multiprocessing.reductions.StorageWeakRef", None)
        self._storage = None if kind is None else kind(storage)

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor, which is alive, has this very memory; empty tensors have none."""
        if not self.address or tensor.untyped_storage().data_ptr() != self.address:
            return False
        return self._storage is None or not self._storage.expired()


def script_as(function: Callable[..., Any], original: Callable[..., Any]) -> None:
    """Let torch.jit.script take `function` for the operator that `original` is to it.

    It looks operators up by the identity of their Python function, in a table that it fills once: before any of them
    is replaced, or it would miss them ever after. Missing: code that calls a replaced operator cannot be scripted.
    """
    table = _find("jit._builtins._get_builtin_table", dict)()
    if id(original) in table:
        table[id(function)] = table[id(original)]


def script_no_longer(function: Callable[..., Any]) -> None:
    """Undo `script_as`. Missing: nothing has to be done."""
    _find("jit._builtins._get_builtin_table", dict)().pop(id(function), None)


def inner_schedulers(scheduler: object) -> list[Any]:
    """The learning-rate schedulers inside a SequentialLR or ChainedScheduler, [] for any other.

    Missing: []. A lasting cut of the learning rate then ends when the next scheduler inside takes over.
    """
    return list(getattr(scheduler, "_schedulers", ()))


def flattened(mesh: DeviceMesh) -> DeviceMesh:
    """The processes of all dimensions of a mesh as one dimension.

    Missing: raises RuntimeError; a `ProcessGroups` made of groups needs no mesh.
    """
    flatten = getattr(mesh, "_flatten", None)
    if flatten is None:
        raise RuntimeError(
            f"torch {torch.__version__} cannot join the dimensions {mesh.mesh_dim_names} of a device mesh: "
            "give ProcessGroups their process group"
        )
    return flatten()


def ring_attention() -> tuple[dict[str, Any], str] | None:
    """Where PyTorch's context parallelism looks up its ring: the globals that hold it, and its name there.

    The ring takes (process group, dimension of the sequence, operator, query, key, value, ...) and calls the operator
    with each block of keys. None before it is imported. Missing: None. Its attention is then listed.
    """
    module = sys.modules.get("torch.distributed.tensor.experimental")
    space = getattr(inspect.unwrap(getattr(module, "context_parallel", ring_attention)), "__globals__", {})
    name = "_templated_ring_attention"
    return (space, name) if name in space else None


def default_store() -> Any:
    """The key-value store by which the processes of torch.distributed found each other.

    Missing: raises RuntimeError. Each process of a monitored run then goes on with its own measurements.
    """
    from torch.distributed import distributed_c10d

    find = getattr(distributed_c10d, "_get_default_store", None)
    if find is None:
        raise RuntimeError(f"torch {torch.__version__} does not tell the store of its processes")
    return find()


@torch.no_grad()
def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy each source into its target, of the same shape and device, by one launch for all where a device can.

    Missing: one launch for each.
    """
    together = _find("_foreach_copy_", None)
    if together is not None and targets:
        together(targets, sources)
        return
    for target, source in zip(targets, sources):
        target.copy_(source)
