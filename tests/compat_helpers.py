"""What the tests of `compat` share: a mark for what each carries, tensors, and a model compiled anew."""

import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode


def carried_by(*names):
    """Marks the test of a behaviour that these entries of `compat` carry; test_compat_whole.py reads the marks."""
    return lambda test: test


def qkv(**options):
    return [torch.randn(2, 3, 7, 4, **options) for _ in range(3)]


class Operators(TorchDispatchMode):
    """Records the operators that run inside."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, _types, args=(), kwargs=None):
        self.seen.append(str(operator))
        return operator(*args, **kwargs or {})


def compiled(model, backend="eager"):
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(model, backend=backend, fullgraph=True)
