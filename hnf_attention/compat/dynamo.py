"""Private names of Dynamo, the tracer of torch.compile, and of what it leaves on modules and functions.

Questions to the tracer are asked while it traces, through `comptime`. Where a later version answers them in another
way, they raise: the caller catches that, logs it once a graph, and the model compiles as if nothing measured it.
Dynamo takes a second to import. It is imported inside the functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import torch
from torch import fx, nn

from .torch import child

WRAPPED = "_orig_mod"
"""The name under which such a wrapper holds the model's module."""


def is_wrapper(module: nn.Module) -> bool:
    """Whether torch.compile made this module around another one. Missing: False."""
    return child(module, WRAPPED) is not None


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside one that torch.compile made, else the module itself. Missing: the module itself."""
    inside = child(module, WRAPPED)
    return module if inside is None else inside


def wrapper_classes() -> list[type]:
    """The class of the modules that torch.compile makes. Missing: [], and calls through them begin no forward."""
    try:
        from torch._dynamo.eval_frame import OptimizedModule
    except ImportError:
        return []
    return [OptimizedModule]


def is_compiled(function: Callable[..., Any]) -> bool:
    """Whether torch.compile returned this function. Missing: False, and its attention counts as never reached."""
    return hasattr(function, "_torchdynamo_orig_callable")


def let_trace(function: Callable[..., Any]) -> None:
    """Let Dynamo trace `function` itself, which has the attributes of a compiled one.

    Such an attribute names the function that Dynamo is to trace instead. Missing: nothing has to be done.
    """
    vars(function).pop("_torchdynamo_inline", None)


def fill_function_table() -> Callable[[], dict[Any, Any]] | None:
    """Have Dynamo look up torch's functions that it puts into graphs untraced; None if it has no table of them.

    It looks them up once, by name. It would not trace a replacement that is already under such a name.
    Missing: a process that compiles for the first time while a model is instrumented measures nothing in its graphs.
    """
    try:
        from torch._dynamo.trace_rules import get_torch_obj_rule_map as table
    except ImportError:
        return None
    table()
    return table


def renew_function_table(function: Callable[..., Any]) -> None:
    """Have Dynamo look up torch's functions again if `function` came among them. Missing: as `fill_function_table`."""
    table: Any = fill_function_table()
    if table is not None and function in table():
        table.cache_clear()


def comptime() -> Callable[[Callable[[Any], None]], None]:
    """What runs a function of one argument while Dynamo traces the call of it. To be traced, never to be run."""
    from torch._dynamo.comptime import comptime

    return comptime


class Frame:
    """A function that Dynamo is tracing, with its local variables as Dynamo knows them.

    context: what `comptime` hands to its function; the frame is the one that called `comptime`.
    """

    def __init__(self, context: Any):
        self._translator = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()

    @classmethod
    def _of(cls, translator: Any) -> Frame:
        self = cls.__new__(cls)
        self._translator = translator
        return self

    @property
    def code(self) -> CodeType:
        return self._translator.f_code

    def callers(self) -> Iterator[Frame]:
        """The frames around this one, from the inside out."""
        translator = self._translator.parent
        while translator is not None:
            yield Frame._of(translator)
            translator = translator.parent

    def local(self, name: str) -> Any:
        """Dynamo's variable of that name, None where the frame has none."""
        return self._translator.symbolic_locals.get(name)

    def assign(self, variables: dict[str, Any]) -> None:
        """Set local variables to Dynamo's variables."""
        self._translator.symbolic_locals.update(variables)

    def is_exported(self) -> bool:
        """Whether the graph is traced for torch.export."""
        return bool(self._translator.output.export or torch.compiler.is_exporting())

    def bodies(self) -> Iterator[Any]:
        """The higher-order operators in whose bodies the frame is traced, from the inside out."""
        part = self._translator.output.current_tracer
        while part.parent is not None:
            yield part.source_target
            part = part.parent

    def first_argument(self) -> Any:
        """The variable of the first argument if it is a module, else None; a module's method has its `self` there."""
        from torch._dynamo.variables.misc import CellVariable

        names = self.code.co_varnames[: self.code.co_argcount][:1]
        variable = self.local(names[0]) if names else None
        if _is_untouched(variable):
            return None
        if isinstance(variable, CellVariable):  # a function or a generator inside the method uses it too
            variable = self._translator.output.side_effects.load_cell(variable)
            if _is_untouched(variable):
                return None
        variable = None if variable is None else variable.realize()
        return variable if isinstance(getattr(variable, "value", None), nn.Module) else None

    def last_call(self, operator: Any) -> fx.Node | None:
        """The last call of `operator` in the graph so far."""
        nodes = reversed(self._translator.output.current_tracer.graph.nodes)
        return next((node for node in nodes if node.target is operator), None)

    def subgraph(self, node: fx.Node) -> fx.GraphModule:
        """The graph that a node stands for, as an argument of a higher-order operator."""
        return self._translator.output.nn_modules[node.target]

    def example(self, node: fx.Node) -> Any:
        """What the node computes, as Dynamo's stand-in: a tensor without numbers, or a symbolic number."""
        return node.meta["example_value"]

    def detached(self, node: fx.Node) -> Any:
        """A variable: the tensor that the node computes, outside autograd."""
        from torch._dynamo.variables.builder import wrap_fx_proxy

        output = self._translator.output
        proxy = output.create_proxy("call_method", "detach", (fx.Proxy(node, output.current_tracer),), {})
        return wrap_fx_proxy(self._translator, proxy)

    def number(self, node: fx.Node) -> Any:
        """A variable: the number that the node computes."""
        from torch._dynamo.variables import SymNodeVariable

        return SymNodeVariable(fx.Proxy(node, self._translator.output.current_tracer), self.example(node))


def mark_static(tensor: torch.Tensor) -> None:
    """Tell compilers that a tensor stays where it is and keeps its shape, so that a CUDA graph may write into it.

    A size would otherwise be taken for another one of the same number, which varies. Missing: a graph that writes into
    the tensor is run without CUDA graphs.
    """
    try:
        from torch._dynamo import mark_static_address
    except ImportError:
        return
    mark_static_address(tensor, guard=False)
    # As torch._dynamo.mark_static does, but for while Dynamo traces.
    vars(tensor)["_dynamo_static_indices"] = set(range(tensor.dim()))


def example_of(variable: Any) -> torch.Tensor:
    """What Dynamo's variable of a tensor computes: a tensor without numbers."""
    return variable.realize().as_proxy().node.meta["example_value"]


def constant(value: Any) -> Any:
    """Dynamo's variable of a Python constant."""
    from torch._dynamo.variables import ConstantVariable

    return ConstantVariable.create(value)


def sequence(variables: list[Any]) -> Any:
    """Dynamo's variable of a list of these."""
    from torch._dynamo.variables import ListVariable

    return ListVariable(variables)


def is_none(variable: Any) -> bool:
    """Whether a variable is the constant None."""
    return variable.is_python_constant() and variable.as_python_constant() is None


def constant_of(variable: Any) -> Any:
    """The Python constant that a variable is; raises where it is none."""
    return variable.as_python_constant()


def module_of(variable: Any) -> nn.Module:
    """The module that a variable of `Frame.first_argument` is."""
    return variable.value


def items(variable: Any) -> list[Any]:
    """The variables in one of a list or tuple."""
    return list(variable.items)


def types_in(variable: Any) -> set[type]:
    """The types of what a variable of a list or tuple holds."""
    return {item.python_type() for item in variable.items}


def _is_untouched(variable: Any) -> bool:
    """Whether looking at the variable would add a guard to the graph: nothing did so far, and it is no module."""
    from torch._dynamo.variables.lazy import LazyVariableTracker

    lazy = isinstance(variable, LazyVariableTracker) and not variable.is_realized()
    return lazy and not isinstance(variable.peek_value(), nn.Module)
