"""Models that another library has wrapped: adapters of peft, weights that accelerate moves."""

import accelerate
import peft
import pytest
import torch
from tiny_gpt2 import LENGTH, heat, tiny_gpt2

from hnf_attention import AttentionStabilityMonitor, apply_intervention, instrument
from hnf_attention.interventions.qk_clip import propose as qk_clip

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # peft asks transformers
]

LAYERS = [f"base_model.model.transformer.h.{i}.attn" for i in range(2)]
TOKENS = torch.randint(0, 40, (4, LENGTH), generator=torch.Generator().manual_seed(0))


def with_adapters(target="c_attn", heated=False):
    """A GPT-2 whose projection `target` has LoRA adapters, which alone are trained."""
    model = tiny_gpt2()
    if heated:
        heat(model)
    config = peft.LoraConfig(r=4, target_modules=[target], fan_in_fan_out=True, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    return peft.get_peft_model(model, config)


def train(model, steps=6):
    torch.manual_seed(2)  # dropout
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_adapters_are_trained_as_without_us_and_all_is_put_back():
    plain, measured = with_adapters(), with_adapters()
    before = dict(vars(measured)), dict(measured.named_modules())
    losses = train(plain)
    with instrument(measured, mode="probe", strict=True) as handle:
        assert train(measured) == losses
    assert list(handle.coverage.measured) == LAYERS and list(handle.latest) == LAYERS
    assert dict(vars(measured)) == before[0] and dict(measured.named_modules()) == before[1]
    assert not measured._forward_hooks and measured.state_dict().keys() == plain.state_dict().keys()
    trained = [name for name, p in measured.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    start = with_adapters().state_dict()
    for name, weight in measured.state_dict().items():
        assert torch.equal(weight, plain.state_dict()[name])
        assert ("lora_" in name) != torch.equal(weight, start[name])


def test_a_projection_with_adapters_is_refused_and_nothing_changed():
    model = with_adapters(heated=True)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    clip = qk_clip(30.0, {LAYERS[0]: [500.0] * 4}, "large scores", None)
    with pytest.raises(ValueError, match=r"c_attn to be a linear layer .* got peft\.[\w.]+ \(merge adapters"):
        apply_intervention(None, clip, model=model)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def train_in_full(model):
    """Train the projections of the queries and keys themselves, beside the adapters."""
    for name, parameter in model.named_parameters():
        if ".c_attn." in name:
            parameter.requires_grad_(True)


@pytest.mark.parametrize(
    "target, in_full, action",
    [("c_attn", False, "reduce_lr"), ("c_fc", False, "reduce_lr"), ("c_fc", True, "qk_clip")],
)
def test_what_is_proposed_can_be_carried_out(target, in_full, action):
    """Adapters elsewhere leave the projections as they are, but frozen: a checkpoint of adapters has no clip."""
    model = with_adapters(target, heated=True).eval()  # dropout would change the scores between the forwards
    if in_full:
        train_in_full(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with AttentionStabilityMonitor(model, log_every=1) as monitor:
        model(input_ids=TOKENS)
        diagnosis = monitor.on_step()
        intervention = monitor.get_intervention(diagnosis)
        assert diagnosis.has_issues() and intervention["action"] == action
        applied = apply_intervention(optimizer, intervention)
        model(input_ids=TOKENS)
        after = monitor.on_step()
    largest = [d.stats[LAYERS[0]].max_abs_logit.max() for d in (diagnosis, after)]
    assert (largest[1] < 30.001) == (action == "qk_clip") and largest[0] > 1000
    assert optimizer.param_groups[0]["lr"] == 5e-3  # which a clip cuts too
    changed = {name for name, p in model.state_dict().items() if not torch.equal(p, before[name])}
    assert all(".c_attn." in name for name in changed) and bool(changed) == (action == "qk_clip")
    applied.revert()
    assert optimizer.param_groups[0]["lr"] == 1e-2
    for name, p in model.state_dict().items():
        torch.testing.assert_close(p, before[name], rtol=2**-23, atol=0.0)  # two roundings, as `revert` says


@pytest.mark.parametrize("in_full", [False, True])
def test_auto_intervene_clips_what_is_trained_beside_adapters(in_full):
    model = with_adapters("c_fc", heated=True)
    if in_full:
        train_in_full(model)
    with AttentionStabilityMonitor(model, log_every=1, auto_intervene=True) as monitor:
        model(input_ids=TOKENS)
        monitor.on_step()
    assert len(monitor.applied) == in_full  # without an optimizer no learning rate can be cut


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_weights_that_accelerate_moves(where, tmp_path):
    """Under its hooks a module's forward is replaced, and weights on the disk are there while it runs."""
    model = tiny_gpt2().eval()
    names = [name for name, _ in model.named_children()]
    plain = model(input_ids=TOKENS).logits.detach()
    devices = {"": "cpu"} if where == "cpu" else {name: "cpu" for name in names} | {"transformer.h.1": "disk"}
    if where == "disk":
        del devices["transformer"]
        devices |= {f"transformer.{part}": "cpu" for part in ("wte", "wpe", "drop", "h.0", "ln_f")}
    model = accelerate.dispatch_model(model, devices, force_hooks=True, offload_dir=tmp_path)
    forward = model.transformer.h[1].attn.forward
    with torch.no_grad(), instrument(model, strict=True) as handle:
        assert torch.equal(model(input_ids=TOKENS).logits, plain)
    assert list(handle.latest) == ["transformer.h.0.attn", "transformer.h.1.attn"]
    assert model.transformer.h[1].attn.forward is forward and hasattr(model, "_hf_hook")
    assert any(p.is_meta for p in model.parameters()) == (where == "disk")
    reference = tiny_gpt2().eval()
    with torch.no_grad(), instrument(reference) as of_reference:
        reference(input_ids=TOKENS)
    for ours, theirs in zip(handle.latest.values(), of_reference.latest.values(), strict=True):
        assert torch.equal(ours.rows.entropy, theirs.rows.entropy)


def test_weights_that_are_not_there_cannot_be_clipped(tmp_path):
    model = tiny_gpt2()
    accelerate.disk_offload(model, tmp_path)
    clip = qk_clip(30.0, {"transformer.h.0.attn": [500.0] * 4}, "large scores", None)
    with pytest.raises(ValueError, match="transformer.h.0.attn.*meta device"):
        apply_intervention(None, clip, model=model)
