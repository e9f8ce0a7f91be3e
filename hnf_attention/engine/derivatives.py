"""The derivatives of the operators, for autograd and for the transforms of torch.func.

A first derivative in reverse mode is an operator of its own. The derivatives of that one are those of the call in plain
PyTorch, to any order. Transforms of torch.func do not differentiate operators of torch.library, so each operator has a
node of autograd that stands for it there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import tracing
from . import batching, library, plain
from .operators import forward_op, gradients_op, sample_op, unflat

_SHAPE = slice(6, 9)  # of the arguments of an operator: is_causal, window_size, numbers


class AttentionNode(torch.autograd.Function):
    """The forward, for transforms of torch.func. It takes and returns what `forward_op` does."""

    @staticmethod
    def forward(*arguments):
        return forward_op(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.shape, ctx.chosen = inputs[_SHAPE], library.choice()
        ctx.mark_non_differentiable(*output[3:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:6], *output[:3])

    @staticmethod
    def backward(ctx, d_out, d_lse, d_entropy, *_):
        *inputs, out, lse, entropy = ctx.saved_tensors
        cotangents = (d_out, d_lse, d_entropy)
        if d_out is d_lse is d_entropy is None:
            return (None,) * 10
        switches = [ctx.needs_input_grad[3], *ctx.chosen]
        found = gradients((*inputs, *ctx.shape), (out, lse, entropy), cotangents, switches)
        d_query, d_key, d_value, d_sinks, d_mask = found
        return d_query, d_key, d_value, d_mask, d_sinks, *(None,) * 5

    @staticmethod
    def vmap(info, in_dims, *arguments):
        rule = batching.in_one_batch if batching.fits_one_batch(arguments) else batching.one_by_one
        return rule(AttentionNode.apply, info.batch_size, in_dims, arguments)


class GradientsNode(torch.autograd.Function):
    """The first derivative, for transforms of torch.func. It takes and returns what `gradients_op` does."""

    @staticmethod
    def forward(*arguments):
        return gradients_op(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *_, (ctx.mask_gradient, *_) = inputs
        ctx.shape = inputs[_SHAPE]
        ctx.set_materialize_grads(False)
        # The results of the forward are functions of its inputs: the second derivative starts from these.
        ctx.save_for_backward(*inputs[:6], *inputs[12:15])

    @staticmethod
    def backward(ctx, *cotangents):
        *inputs, d_out, d_lse, d_entropy = ctx.saved_tensors
        tensors = [*inputs, d_out, d_lse, d_entropy]
        needed = (*ctx.needs_input_grad[:6], *ctx.needs_input_grad[12:15])
        wanted = [i for i, x in enumerate(tensors) if x is not None and needed[i]]
        given = [i for i, cotangent in enumerate(cotangents) if cotangent is not None]
        if not given:
            return (None,) * 16

        def first(*values: Tensor) -> tuple[Tensor, ...]:
            everything = list(tensors)
            for i, value in zip(wanted, values):
                everything[i] = value
            call = unflat(*everything[:6], *ctx.shape)
            pulled = plain.pull_back(call, everything[6:], ctx.mask_gradient)
            return tuple(pulled[i] for i in given)  # type: ignore[misc]

        found = plain.vjp(first, tuple(tensors[i] for i in wanted), tuple(cotangents[i] for i in given))
        seconds: list[Tensor | None] = [None] * len(tensors)
        for i, second in zip(wanted, found):
            seconds[i] = second
        return *seconds[:6], *(None,) * 6, *seconds[6:], None

    @staticmethod
    def vmap(info, in_dims, *arguments):
        # The gradient of a mask is summed over its batch, which must stay the batch of one example.
        folds = batching.fits_one_batch(arguments) and not arguments[-1][0]
        rule = batching.in_one_batch if folds else batching.one_by_one
        return rule(GradientsNode.apply, info.batch_size, in_dims, arguments)


def gradients(
    call: tuple[Any, ...],
    results: tuple[Tensor, Tensor, Tensor],
    cotangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    switches: list[bool],
) -> list[Tensor | None]:
    """The gradients of query, key, value, sinks and mask, each None where there is none; they are differentiable.

    call: the first nine arguments that `operators.flat` gives. results, cotangents: of out, lse and entropy.
    switches: whether the mask has a gradient, and the `library.choice()` at the forward.
    """
    operator = GradientsNode.apply if tracing.functional() else gradients_op
    found = operator(*call, *results, *cotangents, switches)
    _query, _key, value, _mask, sinks, *_ = call
    there = (True, True, value is not None, sinks is not None, switches[0])
    return [x if known else None for x, known in zip(found, there)]


forward_op.register_autograd(AttentionNode.backward, setup_context=AttentionNode.setup_context)
gradients_op.register_autograd(GradientsNode.backward, setup_context=GradientsNode.setup_context)
sample_op.register_vmap(
    lambda info, in_dims, *args: batching.one_by_one(sample_op, info.batch_size, in_dims, args)
)
