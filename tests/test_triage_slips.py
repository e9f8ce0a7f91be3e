"""Slips of users in a step that is to be traced: an error or a note, never "everything is finite" of nothing."""

from types import SimpleNamespace

import pytest
import torch
from compat_helpers import carried_by
from torch import nn

from hnf_attention import trace_non_finite
from hnf_attention.cli.main import main


def model_with_nan():
    model = nn.Linear(4, 1)
    with torch.no_grad():
        model.weight[0, 1] = torch.nan
    return model


def loss_of(model):
    return model(torch.ones(3, 4)).square().mean()


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        (lambda loss: float(loss.detach()), "float"),
        (lambda loss: loss.detach().numpy()[()], "float32"),
        (lambda loss: None, "NoneType"),
        (lambda loss: {"loss": loss.item()}, "float"),
        (lambda loss: SimpleNamespace(loss=loss.item()), "float"),
        (lambda loss: (loss.item(), 3), "float"),
        (lambda loss: {}, "dict"),
        (lambda loss: loss.detach().isnan(), "a tensor of torch.bool"),
    ],
)
def test_a_step_without_a_loss_tensor_is_refused(returned, got):
    model = model_with_nan()
    before = model.weight.clone()
    with pytest.raises(TypeError, match=f"^expected a loss tensor, got {got}$"):
        trace_non_finite(model, lambda: returned(loss_of(model)))
    torch.testing.assert_close(model.weight, before, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(TypeError, match=f"got {got}$"):
        trace_non_finite(model, torch.ones(3, 4), lambda out: returned(out.square().mean()))


@pytest.mark.parametrize("returned", [lambda loss: loss.item(), lambda loss: None])
def test_a_step_that_runs_its_backward_may_return_anything(returned):
    model = model_with_nan()

    def step():
        loss = loss_of(model)
        loss.backward()
        return returned(loss)

    trace = trace_non_finite(model, step)
    assert trace.found and trace.notes == ()


def test_a_loss_without_a_graph_is_traced_forward_and_a_note_says_so():
    note = "the loss requires no gradient"
    for model, found in ((model_with_nan(), True), (nn.Linear(4, 1), False)):
        trace = trace_non_finite(model, lambda model=model: loss_of(model).detach())
        assert trace.found is found and sum(note in text for text in trace.notes) == 1
        assert not any(note in text for text in trace_non_finite(model, lambda m=model: loss_of(m)).notes)


def test_a_number_beside_outputs_is_named_in_a_note():
    model = nn.Linear(4, 1)
    trace = trace_non_finite(model, lambda: {"loss": loss_of(model).item(), "out": model(torch.ones(3, 4))})
    assert not trace.found and "the loss is of type float, no tensor" in trace.notes[0]


@pytest.mark.parametrize("names", [["0.weight", "0.bias", "1.weight", "1.bias"], ["1.weight"]])
@pytest.mark.parametrize("closure", [False, True])
def test_a_model_on_the_meta_device_is_refused(names, closure):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    for name in names:
        layer = model.get_submodule(name[0])
        setattr(layer, name[2:], nn.Parameter(getattr(layer, name[2:]).detach().to("meta")))
    batch = (lambda: loss_of(model)) if closure else torch.ones(3, 4)
    with pytest.raises(
        ValueError, match=f"a model with data, got parameters on the meta device: {names[0]}$"
    ):
        trace_non_finite(model, batch)


@carried_by("offloaded")
def test_an_offloaded_model_is_traced():
    accelerate = pytest.importorskip("accelerate")
    model = model_with_nan()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.weight.is_meta
    assert trace_non_finite(model, lambda: loss_of(model).detach(), wide=False).found


def test_a_closed_folder_is_said_to_be_closed(monkeypatch, capsys):
    def closed(path, *args, **kwargs):  # as the system answers anybody but root
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.stat", closed)
    assert main(["check", "closed/model"]) == 2
    said = capsys.readouterr().err
    assert "got closed/model: Permission denied" in said and "fault of" not in said
