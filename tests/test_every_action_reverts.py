"""Every action on every layout beside every optimizer: taken back bit for bit, or refused before anything moves.

And a checkpoint that is taken in between, loaded where the same was applied, goes on as the run that wrote it.
"""

import copy

import pytest
import torch
from leftovers import leave_nothing_behind  # noqa: F401
from test_layouts_and_optimizers import LAYOUTS, OPTIMIZERS, assert_same, loud, run, sizes_of
from torch.nn import functional

from hnf_attention import apply_intervention
from hnf_attention.interventions import GoodStates, start_qk_norm
from hnf_attention.interventions.apply import ACTIONS

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

#: Actions on a layer's weights or calls, given the layer and the largest score of each of its heads.
OF_A_LAYER = {
    "qk_clip": lambda layer, sizes: {"threshold": 25.0, "layers": {layer: sizes}, "lr_factor": 0.7},
    "temperature": lambda layer, sizes: {"layers": {layer: [3.0] * len(sizes)}},
    "increase_dropout": lambda layer, sizes: {"layer": layer},
    "standing_qk_clip": lambda layer, sizes: {"threshold": 25.0},
    "qk_norm": lambda layer, sizes: {"layers": [layer]},
    "qk_rate": lambda layer, sizes: {"factor": 0.5, "layers": {layer: len(sizes)}},
    "sigma_reparam": lambda layer, sizes: {"layers": {layer: len(sizes)}},
    "softcap": lambda layer, sizes: {"layers": [layer], "cap": 20.0},
    "precision": lambda layer, sizes: {"layers": [layer]},
    "prune_heads": lambda layer, sizes: {"layers": {layer: [0]}},
}
OF_A_RUN = {
    "reduce_lr": {"factor": 0.3},
    "rewind": {"before": 60},
    "rewarm_lr": {"steps": 10},
    "set_eps": {"eps": 1e-6},
    "skip_spikes": {},
}
#: The user's own kind of layer that each action takes.
TAKEN = "fused q, k, v"


def wanted_of(action, layer, sizes):
    more = OF_A_LAYER[action](layer, sizes) if action in OF_A_LAYER else OF_A_RUN[action]
    return {"action": action, "reason": "", **more}


class Training:
    """A model of a layout that has trained two steps."""

    def __init__(self, kind, make_optimizer, steps=2):
        torch.manual_seed(0)
        self.model = LAYOUTS[kind][0]()
        loud(self.model)
        self.optimizer = make_optimizer([p for p in self.model.parameters() if p.requires_grad])
        self.states = GoodStates(self.model, self.optimizer)
        for _ in range(steps):
            self.step()

    def step(self):
        run(self.model).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)

    def numbers(self):
        """All that a checkpoint holds, and all that hangs on the model."""
        modules = list(self.model.modules())
        hooks = [{k: len(v) for k, v in vars(m).items() if k.endswith("hooks")} for m in modules]
        dropout = [getattr(m, "p", getattr(m, "dropout", None)) for m in modules]
        dropout = [x for x in dropout if isinstance(x, float)]
        optimizer = copy.deepcopy(self.optimizer.state_dict())
        return copy.deepcopy(dict(self.model.state_dict())), optimizer, hooks, dropout

    def output(self):
        with torch.no_grad():
            return run(self.model).clone()


def applied_to(training, action):
    """What was applied, None if it was refused; then nothing has changed."""
    sizes = sizes_of(training.model)
    layer, largest = next(iter(sizes.items()))
    before = training.numbers()
    try:
        wanted = wanted_of(action, layer, largest.tolist())
        return apply_intervention(training.optimizer, wanted, training.model)
    except ValueError as error:
        assert "expected" in str(error)
        assert_same(training.numbers(), before)
        return None


def cells():
    for action in (*OF_A_LAYER, *OF_A_RUN):
        for number, optimizer in enumerate(OPTIMIZERS):
            for kind in LAYOUTS:
                first = number == 1 and kind == TAKEN
                marks = () if first else pytest.mark.exhaustive
                yield pytest.param(action, kind, optimizer, marks=marks, id=f"{action}-{kind}-{optimizer}")


def test_each_action_is_here():
    assert {*OF_A_LAYER, *OF_A_RUN} == set(ACTIONS)


@pytest.mark.parametrize(("action", "kind", "optimizer"), list(cells()))
def test_it_is_taken_back_bit_for_bit(action, kind, optimizer):
    plain = functional.scaled_dot_product_attention
    training = Training(kind, OPTIMIZERS[optimizer])
    before, output = training.numbers(), training.output()
    applied = applied_to(training, action)
    if applied is None:
        assert kind != TAKEN or action == "increase_dropout" or (optimizer, action) in REFUSED
    else:
        try:
            training.output()
        except RuntimeError as error:  # a layer whose attention these cannot reach says so in its next call
            assert action in ON_CALLS and "expected" in str(error)
        applied.revert()
        applied.revert()
    assert_same(training.numbers(), before)
    assert torch.equal(training.output(), output)
    assert functional.scaled_dot_product_attention is plain
    training.step()
    twin = Training(kind, OPTIMIZERS[optimizer], steps=3)
    assert_same(training.numbers(), twin.numbers())


ON_CALLS = ("softcap", "precision", "prune_heads", "qk_norm")
#: SGD, Adafactor and Muon have no epsilon that means the same, or none at all. Muon takes no gain that is a vector.
REFUSED = {("sgd", "set_eps"), ("adafactor", "set_eps"), ("muon", "set_eps")}
REFUSED |= {("muon", "qk_norm"), ("muon", "sigma_reparam")}
#: What they count since they began is no part of a checkpoint: see docs/support.md.
COUNTS = ("rewarm_lr", "skip_spikes", "standing_qk_clip")
#: Weights, rates and other numbers that it holds.
IN_THE_CHECKPOINT = ("rewind", "qk_clip", "temperature", "reduce_lr", "set_eps")


@pytest.mark.parametrize(
    ("action", "optimizer"),
    [
        pytest.param(action, name, marks=() if number == 1 else pytest.mark.exhaustive)
        for action in (*OF_A_LAYER, *OF_A_RUN)
        if action not in COUNTS
        for number, name in enumerate(OPTIMIZERS)
    ],
)
def test_a_checkpoint_in_between_restores_the_same_run(action, optimizer):
    if action == "increase_dropout":
        pytest.skip("a rate of dropout is the model's own attribute, and random")
    training = Training(TAKEN, OPTIMIZERS[optimizer])
    if applied_to(training, action) is None:
        assert (optimizer, action) in REFUSED
        return
    training.step()
    saved = copy.deepcopy((training.model.state_dict(), training.optimizer.state_dict()))
    for _ in range(3):
        training.step()
    resumed = Training(TAKEN, OPTIMIZERS[optimizer])
    if action == "qk_norm":
        start_qk_norm(resumed.model, resumed.optimizer, gains=saved[0])
    elif action not in IN_THE_CHECKPOINT:
        assert applied_to(resumed, action) is not None
    resumed.model.load_state_dict(saved[0])
    resumed.optimizer.load_state_dict(saved[1])
    for _ in range(3):
        resumed.step()
    assert_same(resumed.numbers()[:2], training.numbers()[:2])
