"""Names of Gluon that differ between the versions of Triton that compile this forward (3.6 to 3.9)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language import core

aggregate = getattr(gluon, "aggregate", None) or core._aggregate  # 3.6 has no public name for this
# Copies between global and shared memory by the bulk-copy engine; the first names came with 3.8.
copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
copy_out = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # of the warps that run the same part
