"""Instrumentation: every attention call of a model is intercepted and measured, and the model stays as it is.

The data goes one way: an interceptor describes a call, the observer of its layer has the engine compute it, and
`on_measure` gets the `Measurement`.
"""

from .blocks import observe_blocks
from .call import Unmeasurable
from .coverage import Coverage
from .handle import Instrumentation, instrument
from .measurement import Forward, Measurement
from .registry import CallDescription, RegisteredInterceptor, register_interceptor
from .watched import restore

__all__ = [
    "CallDescription",
    "Coverage",
    "Forward",
    "Instrumentation",
    "Measurement",
    "RegisteredInterceptor",
    "Unmeasurable",
    "instrument",
    "observe_blocks",
    "register_interceptor",
    "restore",
]
