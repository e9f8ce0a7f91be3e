"""A GPT-2 of two layers that trains in milliseconds a step, text for it, and a way to break it."""

import torch
import transformers

from hnf_attention.cli.demo.model import standard_library_text

LAYERS = ["transformer.h.0.attn", "transformer.h.1.attn"]
LENGTH = 24


def tiny_gpt2(vocabulary=40, **options):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_layer=2, n_embd=32, n_head=4, n_positions=32, **options
    )
    return transformers.GPT2LMHeadModel(config)


def heat(model, factor=200.0):
    """Multiply the query and key weights: scores are below 0.1 before, between 1,400 and 2,300 after."""
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight[:, :64] *= factor


def byte_windows(count):
    """So many windows of LENGTH bytes of the standard library's sources, int64."""
    return standard_library_text(count * LENGTH).view(count, LENGTH).long()
