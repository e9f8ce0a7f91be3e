"""Names of layers: without the modules that others put around a model or a part of it."""

import pytest
import torch
from attention_models import Model
from torch import nn

from hnf_attention.names import named_modules, unwrapped


class Own(nn.Module):
    """A model whose own child bears the name that wrappers give."""

    def __init__(self):
        super().__init__()
        self.module = nn.Sequential(nn.Linear(2, 2))


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def names(model):
    return [name for name, _ in named_modules(model)]


@pytest.mark.parametrize("make", [Model, Own])
@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        nn.parallel.DistributedDataParallel,
        torch.compile,
        lambda model: torch.compile(nn.parallel.DistributedDataParallel(model)),
        lambda model: nn.parallel.DistributedDataParallel(torch.compile(model)),
    ],
)
def test_wrappers_around_the_model_leave_its_names(process_group, make, wrap):
    model = make()
    wrapped = wrap(model)
    assert names(wrapped) == names(model) == [name for name, _ in model.named_modules()]
    assert dict(named_modules(wrapped))[""] is model and unwrapped(wrapped) is model


def test_wrappers_inside_the_model_leave_its_names():
    model = Model()
    plain = names(model)
    model.blocks[0].attn = torch.compile(model.blocks[0].attn)
    model.blocks[1] = nn.DataParallel(model.blocks[1])
    assert names(model) == plain and unwrapped(model) is model
