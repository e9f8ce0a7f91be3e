"""Modules that call scaled_dot_product_attention: attribution, every shape, restoring, faults."""

import logging
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from attention_models import LAYERS, Attention, Direct, Model, x
from torch import nn

from hnf_attention.engine import engines
from hnf_attention.instrumentation import instrument, measurer

ORIGINAL = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def _seed_and_leave_nothing_behind():
    torch.manual_seed(0)
    yield
    assert F.scaled_dot_product_attention is ORIGINAL


def expected_rows(module, inputs, attn_mask=None, is_causal=False, scale=None, **_):
    """(entropy, max_weight) from attention weights, in double precision."""
    q, k, _ = (y.double() for y in module.split(inputs))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        hidden = torch.ones(scores.shape[-2:]).triu(1).bool()
        scores = scores.masked_fill(hidden, -torch.inf)
    if attn_mask is not None:
        scores = (
            scores.masked_fill(~attn_mask, -torch.inf)
            if attn_mask.dtype == torch.bool
            else scores + attn_mask
        )
    weights = scores.softmax(-1)
    return -torch.special.xlogy(weights, weights).sum(-1), weights.amax(-1)


MASK = torch.rand(20, 20) > 0.4
MASK[:, 0] = True
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.7, "is_causal": True},
    "bool mask": {"attn_mask": MASK},
    "mask per batch": {"attn_mask": torch.stack([MASK, MASK.flip(0) | torch.eye(20).bool()])[:, None]},
    "mask and causal": {"attn_mask": MASK, "is_causal": True},
    "additive mask": {"attn_mask": torch.randn(20, 20).masked_fill(~MASK, -torch.inf)},
    "finfo.min mask": {"attn_mask": torch.zeros(20, 20).masked_fill(~MASK, torch.finfo(torch.float32).min)},
}


@pytest.mark.parametrize("mode", ["probe", "fused", pytest.param("auto", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", OPTIONS)
def test_output_and_rows(name, mode):
    model, inputs = Model(**OPTIONS[name]), x()
    try:
        plain = model(inputs)
    except RuntimeError as error:  # torch 2.14 takes either a mask or is_causal
        pytest.skip(str(error))
    with instrument(model, mode=mode) as handle:
        output = model(inputs)
    exact = {} if mode == "fused" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(output, plain, **exact)
    assert list(handle.latest) == LAYERS
    how = "fused" if mode == "fused" else "probe"
    if name == "mask and causal" and mode == "fused":
        how = "probe: both attn_mask and is_causal"
    assert handle.coverage.measured == dict.fromkeys(LAYERS, f"{how} (scaled_dot_product_attention)")
    entropy, max_weight = expected_rows(model.blocks[0].attn, inputs, **OPTIONS[name])
    measurement = handle.latest[LAYERS[0]]
    assert not measurement.rows.entropy.requires_grad and not measurement.rows.lse.requires_grad
    torch.testing.assert_close(measurement.rows.entropy.double(), entropy, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(measurement.rows.max_weight.double(), max_weight, rtol=1e-4, atol=1e-5)
    if "mask" in name:
        mask = OPTIONS[name]["attn_mask"]
        seen = mask if mask.dtype == torch.bool else mask > -1e30
        seen = seen.tril() if "causal" in name else seen
        torch.testing.assert_close(
            measurement.visible_keys.expand(2, 4, 20), seen.sum(-1).expand(2, 4, 20), rtol=0, atol=0
        )
    q, k, _ = model.blocks[0].attn.split(inputs)
    torch.testing.assert_close(measurement.query_norm, q.norm(dim=(2, 3)))
    torch.testing.assert_close(measurement.key_norm, k.norm(dim=(2, 3)))
    assert (measurement.head_dim, measurement.dtype) == (4, torch.float32)


def test_auto_probes_on_a_card_where_fused_was_not_measured(monkeypatch):
    covers = SimpleNamespace(**vars(engines) | {"kernels_cover": lambda query, value: True})
    monkeypatch.setattr(measurer, "engines", covers)
    model, inputs = Model(), x()
    plain = model(inputs)
    with instrument(model, mode="auto") as handle:
        assert torch.equal(model(inputs), plain)
    why = "fused attention: not measured on this card (cpu)"
    assert handle.coverage.measured == dict.fromkeys(LAYERS, f"probe: {why} (scaled_dot_product_attention)")


SHAPES = {
    "3-D": (((3, 7, 8), (3, 9, 8), (3, 9, 5)), (3, 7, 9), {}, (3, 1, 7)),
    "2-D": (((7, 8), (9, 8), (9, 5)), (7, 9), {}, (1, 1, 7)),
    "5-D": (((2, 3, 4, 7, 8), (2, 3, 4, 9, 8), (2, 3, 4, 9, 5)), (3, 1, 7, 9), {}, (6, 4, 7)),
    "grouped heads": (((2, 4, 7, 8), (2, 2, 9, 8), (2, 2, 9, 5)), (1, 9), {"enable_gqa": True}, (2, 4, 7)),
    "broadcast batch": (((1, 4, 7, 8), (2, 4, 9, 8), (2, 4, 9, 5)), None, {}, (2, 4, 7)),
    "broadcast key head": (((2, 4, 7, 8), (2, 1, 9, 8), (2, 1, 9, 5)), (2, 1, 7, 9), {}, (2, 4, 7)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_that_sdpa_takes(name):
    shapes, mask_shape, options, rows = SHAPES[name]
    tensors = [torch.randn(shape) for shape in shapes]
    if mask_shape is not None:
        options = {**options, "attn_mask": torch.rand(mask_shape) > 0.3}
        options["attn_mask"][..., 0] = True
    model = Direct()
    plain = model(*tensors, **options)
    for mode in ("probe", "fused"):
        with instrument(model, mode=mode) as handle:
            output = model(*tensors, **options)
        assert output.shape == plain.shape
        torch.testing.assert_close(output, plain)
        assert handle.latest[""].rows.entropy.shape == rows
        assert handle.coverage.measured[""].startswith(mode)


def test_what_the_original_refuses_is_refused_and_not_held_against_the_layer():
    model, q = Direct(), torch.randn(2, 4, 7, 8)
    wrong = [
        ((q, q[..., :4], q), {}),
        ((q, q[:, :2], q[:, :2]), {}),
        ((q, q, q), {"unknown": 1}),
    ]
    with instrument(model, mode="fused") as handle:
        for tensors, options in wrong:
            with pytest.raises((RuntimeError, TypeError)):
                model(*tensors, **options)
        assert not handle.coverage.not_measured and not handle.latest
        model(q, q, q)
    assert handle.coverage.measured[""].startswith("fused")


def test_two_calls_of_one_module_are_two_records():
    class Twice(Attention):
        def forward(self, inputs):
            return super().forward(inputs) + super().forward(2 * inputs)

    model = Twice()
    with instrument(model) as handle:
        records = []
        handle.on_measure = records.append
        model(x())
    assert [record.layer for record in records] == ["", ""] and not handle.latest
    assert not torch.equal(records[0].rows.entropy, records[1].rows.entropy)


@pytest.mark.parametrize("mode", ["probe", "fused"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_layers_are_counted_once(mode, use_reentrant):
    model = Model(use_reentrant, is_causal=True)
    inputs = x(requires_grad=True)

    def gradients():
        model.zero_grad()
        model(inputs).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    with instrument(model, mode=mode) as handle:
        records = []
        handle.on_measure = lambda measurement: records.append(measurement.layer)
        for _ in range(2):
            measured = gradients()
    assert records == LAYERS * 2
    for got, expected in zip(measured, plain):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["probe", "fused"])
def test_a_fault_between_forward_and_recomputation_breaks_no_checkpoint(mode):
    model = Model(use_reentrant=False)

    def broken(measurement):
        raise ValueError("no disk")

    with instrument(model, mode=mode) as handle:
        handle.on_measure = broken
        model(x(requires_grad=True)).sum().backward()
    assert set(handle.coverage.not_measured) == set(LAYERS)


@pytest.mark.parametrize("mode", ["probe", "fused"])
def test_a_fault_of_the_monitor_costs_one_measurement_and_not_the_run(mode, monkeypatch, caplog):
    model, inputs = Model(), x()
    plain = model(inputs)
    real = measurer.api.attend
    calls = []

    def sometimes(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("kernel exploded")
        return real(*args, **kwargs)

    with instrument(model, mode=mode) as handle, caplog.at_level(logging.WARNING, "hnf_attention"):
        monkeypatch.setattr(measurer.api, "attend", sometimes)
        torch.testing.assert_close(model(inputs), plain)
        assert list(handle.latest) == list(handle.coverage.measured) == [LAYERS[1]]
        assert "kernel exploded" in handle.coverage.not_measured[LAYERS[0]]
        for _ in range(2):
            torch.testing.assert_close(model(inputs), plain)
    assert len(caplog.records) == 1
    assert all(text in caplog.text for text in ("blocks.0.attn", "kernel exploded"))
    assert set(handle.latest) == set(handle.coverage.measured) == set(LAYERS)
    assert not handle.coverage.not_measured
    assert len(calls) == 6  # each layer once in each forward


def test_a_layer_whose_measuring_keeps_failing_is_tried_ever_more_rarely():
    model, inputs = Model(), x()
    tried, done = [], []

    def fail(measurement):
        if measurement.layer == LAYERS[0]:
            tried.append(len(done))
            raise RuntimeError("never")

    with instrument(model) as handle:
        handle.on_measure = fail
        for _ in range(200):
            done.append(model(inputs))
    assert tried == [0, 1, 3, 7, 15, 31, 63, 127, 191]
    assert handle.failing == {LAYERS[0]: "measuring failed: RuntimeError: never"}


def test_errors_of_the_models_own_attention_propagate():
    class Failing(Attention):
        def forward(self, inputs):
            return F.scaled_dot_product_attention(*self.split(inputs), attn_mask=torch.ones(3, 3))

    model = Failing()
    with instrument(model) as handle, pytest.raises(RuntimeError):
        model(x())
    assert not handle.coverage.measured


def test_dropout_and_trained_masks_are_probed_and_said_so():
    bias = nn.Parameter(torch.zeros(20, 20))
    for options, why in (
        ({"dropout_p": 0.3}, "dropout"),
        ({"attn_mask": bias}, "the additive mask requires a gradient"),
    ):
        model = Model(**options)
        inputs = x()
        torch.manual_seed(5)
        plain = model(inputs)
        with instrument(model, mode="fused") as handle:
            torch.manual_seed(5)
            torch.testing.assert_close(model(inputs), plain, rtol=0, atol=0)
        assert set(handle.coverage.measured.values()) == {f"probe: {why} (scaled_dot_product_attention)"}


def test_not_measuring_is_the_models_own_attention(monkeypatch):
    model, inputs = Model(), x()
    restored = instrument(model)  # still alive, but measuring no more
    restored.restore()
    with instrument(model, mode="fused") as handle:
        handle.measuring = False

        def never(*args, **kwargs):
            raise AssertionError("work was done off cadence")

        with monkeypatch.context() as patch:
            patch.setattr(measurer.observer, "running_owner", never)
            patch.setattr(handle, "attend", never)
            model(inputs)
        assert not handle.latest
        handle.measuring = True
        model(inputs)
        assert list(handle.latest) == LAYERS


def test_other_models_are_untouched_and_each_has_its_own_measurements():
    first, second, third, inputs = Model(), Model(), Model(), x()
    with instrument(first) as one, instrument(second) as two:
        third(inputs)
        assert not one.latest and not two.latest
        first(inputs)
        assert list(one.latest) == LAYERS and not two.latest
        two.measuring = False
        second(inputs)
        assert not two.latest
        one.restore()
        two.measuring = True
        second(inputs)
        assert list(two.latest) == LAYERS


def test_a_part_of_a_model_and_overlap():
    model = Model()
    with instrument(model.blocks[1]) as handle:
        model(x())
        assert list(handle.latest) == ["attn"]
        for overlapping in (model, model.blocks[1].attn):
            with pytest.raises(ValueError, match=r"hnf_attention.restore\(model\)"):
                instrument(overlapping)
        with instrument(model.blocks[0]):
            pass
    with instrument(model):
        pass


def test_bad_arguments():
    with pytest.raises(TypeError, match="torch.nn.Module"):
        instrument("gpt2")
    with pytest.raises(ValueError, match=r"'auto', 'fused', 'probe'.*'quick'"):
        instrument(Model(), mode="quick")


def test_empty_sequences_and_non_finite_numbers():
    model = Direct()
    with instrument(model) as handle:
        empty = torch.randn(2, 4, 0, 8)
        model(empty, empty, empty)
        assert handle.latest[""].rows.entropy.shape == (2, 4, 0)
        q = torch.randn(2, 4, 7, 8)
        q[0, 1, 2] = torch.nan
        model(q, q, q)
        rows = handle.latest[""].rows
        assert rows.entropy[0, 1].isnan().all() and rows.entropy[1].isfinite().all()


def test_autocast_measures_in_the_dtype_that_attention_runs_in():
    model, inputs = Model(), x()
    plain, outputs = [], {}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model(inputs)
        for mode in ("probe", "fused"):
            with instrument(model, mode=mode) as handle:
                outputs[mode] = model(inputs)
            assert handle.latest[LAYERS[0]].dtype == torch.bfloat16
            assert handle.coverage.measured[LAYERS[0]].startswith(mode)
    torch.testing.assert_close(outputs["probe"], plain, rtol=0, atol=0)
    torch.testing.assert_close(outputs["fused"], plain, rtol=2e-2, atol=5e-2)


def test_threads_do_not_disturb_each_other():
    models, inputs = [Model(), Model()], x()
    handles = [instrument(model) for model in models]
    threads = [threading.Thread(target=lambda m=m: [m(inputs) for _ in range(20)]) for m in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle, model in zip(handles, models):
        entropy, _ = expected_rows(model.blocks[0].attn, inputs)
        got = handle.latest[LAYERS[0]].rows.entropy.double()
        torch.testing.assert_close(got, entropy, rtol=1e-4, atol=1e-5)
        handle.restore()


def test_state_dict_and_modules_are_unchanged():
    model = Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with instrument(model, mode="fused"):
        model(x()).sum().backward()
        assert list(model.state_dict()) == list(before)
        torch.save(model.state_dict(), "/dev/null")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("mode", ["probe", "auto"])
@pytest.mark.parametrize("name", OPTIONS)
def test_no_host_synchronisation(name, mode):
    options = {key: value.cuda() if torch.is_tensor(value) else value for key, value in OPTIONS[name].items()}
    model, inputs = Model(**options).cuda(), x().cuda()
    with instrument(model, mode=mode) as handle:
        model(inputs)  # compiles the kernels
        records = []
        handle.on_measure = records.append
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(records) == 2
