"""Hugging Face models on a card: which way is taken there, and that the numbers are those of the CPU."""

import pytest
import torch
from families import FAMILIES, enable_checkpointing, inputs

from hnf_attention.engine import engines
from hnf_attention.engine.call import not_half
from hnf_attention.engine.card import card_of, current_device
from hnf_attention.instrumentation import instrument

pytestmark = pytest.mark.gpu


def fused_path(refused: str) -> str:
    """What the coverage says of a fused call that the Hopper kernel refuses for that reason, or for the card itself."""
    reason = engines.hopper_runs_on(card_of(current_device())) or refused
    return f"fused; not by the Hopper kernel: {reason} (transformers sdpa)"


@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_fused_gradients_for_sdpa_on_a_gpu(use_reentrant):
    """A checkpoint is recomputed in a thread of autograd's there: the layers must still be found."""
    family = FAMILIES["llama"]
    model = family.build("sdpa").cuda().train()
    arguments = {name: tensor.cuda() for name, tensor in inputs(family, "none").items()}

    def step():
        model.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            model(**arguments, labels=arguments["input_ids"]).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = step()
    if use_reentrant is not None:
        enable_checkpointing(model, use_reentrant)
        model.enable_input_require_grads()
    with instrument(model, "fused", strict=True) as instrumentation:
        seen = []
        instrumentation.on_measure = lambda measurement: seen.append(measurement.layer)
        fused = step()
    assert set(instrumentation.coverage.measured.values()) == {fused_path("needs more than 64 queries")}
    assert seen == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    for got, expected in zip(fused, plain):
        torch.testing.assert_close(got, expected, rtol=0.1, atol=0.03 * float(expected.abs().max()))


def test_auto_probes_beside_a_user_mask_on_a_gpu():
    family = FAMILIES["llama"]
    model = family.build("sdpa").cuda()
    with instrument(model, "auto", strict=True) as instrumentation, torch.no_grad():
        model(**{name: tensor.cuda() for name, tensor in inputs(family, "right").items()})
    why = "under a mask, a probe beside PyTorch's kernel is cheaper"
    assert set(instrumentation.coverage.measured.values()) == {f"probe: {why} (transformers sdpa)"}


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "bert", "t5", "gpt-oss", "gemma2"])
@torch.no_grad()
def test_statistics_on_a_gpu_equal_those_of_the_cpu(name):
    family = FAMILIES[name]
    implementation = family.implementations[-1]
    model = family.build(implementation)
    arguments = inputs(family, "right")
    with instrument(model) as instrumentation:
        model(**arguments)
    expected = instrumentation.latest
    model.cuda()
    path = "fused" if implementation == "sdpa" else "probe"
    refused = "takes no additive mask" if name == "t5" else not_half(torch.float32)
    how = fused_path(refused) if path == "fused" else f"probe (transformers {implementation})"
    with instrument(model, path) as instrumentation:
        model(**{key: tensor.cuda() for key, tensor in arguments.items()})
    assert set(instrumentation.coverage.measured.values()) == {how}
    first = next(iter(expected))  # later layers see other padding rows where the output is fused
    for field in ("entropy", "lse", "max_logit"):
        got = getattr(instrumentation.latest[first].rows, field).cpu()
        torch.testing.assert_close(got, getattr(expected[first].rows, field), rtol=2e-3, atol=2e-3)
