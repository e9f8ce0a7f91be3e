"""The loop of the proposal on real training: a run that fails without it ends resolved, healthy runs are left alone."""

from itertools import islice

import pytest
import torch
import torch.nn.functional as F

from hnf_attention import AttentionStabilityMonitor, apply_intervention
from hnf_attention.cli.demo.model import GPT, batches, standard_library_text
from hnf_attention.interventions import GoodStates, start_qk_norm

STEPS, CONTEXT, RESOLVED = 200, 32, 0.25  # nats, as in the laboratory
LONGEST = 2 * STEPS  # what a restart gives up is trained again, as in the laboratory


class Run:
    """A byte-level GPT on Python sources. Its warmup is long, so that scores run away while the loss still falls."""

    def __init__(self, rate, sharpness, seed=0, optimizer="adamw", warmup=100):
        torch.manual_seed(seed)
        self.model = GPT(2, 32, 2, CONTEXT, sharpness)
        if optimizer == "muon":
            matrices = [p for n, p in self.model.named_parameters() if p.dim() == 2 and "blocks" in n]
            rest = [p for n, p in self.model.named_parameters() if p.dim() != 2 or "blocks" not in n]
            self.optimizers = [torch.optim.Muon(matrices, lr=rate), torch.optim.AdamW(rest, lr=rate)]
        else:
            self.optimizers = [torch.optim.AdamW(self.model.parameters(), lr=rate, weight_decay=0.0)]
        schedule = torch.optim.lr_scheduler.LinearLR
        self.schedulers = [schedule(x, 1 / warmup, total_iters=warmup - 1) for x in self.optimizers]
        self.loader = islice(batches(standard_library_text(), 8, CONTEXT, seed), LONGEST)
        self.losses = []

    def states(self):
        return GoodStates(self.model, self.optimizers, every=20, keep=4, scheduler=self.schedulers)

    def train_step(self, batch):
        inputs, targets = batch
        loss = F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer, scheduler in zip(self.optimizers, self.schedulers):
            optimizer.step()
            scheduler.step()
        self.losses.append(loss.item())
        return loss

    @property
    def final(self):
        return sum(self.losses[-40:]) / 40


def untreated(*given, normed=False, **options):
    run = Run(*given, **options)
    if normed:
        start_qk_norm(run.model, run.optimizers)
    for batch in islice(run.loader, STEPS):
        run.train_step(batch)
    return run.final


def as_proposed(run, optimizer):
    """Word for word, but for the good states that the monitor is given, and that end the run at its planned length."""
    model, loader, train_step, done = run.model, run.loader, lambda model, batch: run.train_step(batch), []
    states = run.states()
    monitor = AttentionStabilityMonitor(model, log_every=10, good_states=states)
    for batch in loader:
        loss = train_step(model, batch)
        diagnosis = monitor.on_step()  # None between log steps
        if diagnosis and diagnosis.has_issues():
            intervention = monitor.get_intervention(diagnosis)
            if intervention:
                done.append(apply_intervention(optimizer, intervention))
        if states.done == STEPS:
            break
    monitor.restore()
    assert loss.isfinite() and states.done == STEPS
    return done


FAILING = (6e-2, 16.0)


@pytest.mark.slow
def test_the_proposals_loop_resolves_a_run_that_fails_without_it():
    alone = untreated(*FAILING)
    reference = untreated(FAILING[0] / 8, FAILING[1], normed=True)
    assert alone - reference > RESOLVED, (alone, reference)
    run = Run(*FAILING)
    done = as_proposed(run, run.optimizers[0])
    names = [[action.name for action in x.actions] for x in done]
    # Back to step 0, and from later on with QK-norm.
    assert names[0] == ["rewind", "reduce_lr"] and ["rewind", "qk_norm", "reduce_lr"] in names[:2]
    assert run.final - reference < RESOLVED, (run.final, reference, alone)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_so_does_the_monitor_by_itself(seed):
    reference = untreated(FAILING[0] / 8, FAILING[1], seed=seed, normed=True)
    run = Run(*FAILING, seed=seed)
    states = run.states()
    with AttentionStabilityMonitor(
        run.model, log_every=10, auto_intervene=True, good_states=states
    ) as monitor:
        for batch in run.loader:
            run.train_step(batch)
            monitor.on_step()
            if states.done == STEPS:
                break
    assert monitor.applied and monitor.applied[-1].outcome in ("kept", "open")
    assert untreated(*FAILING, seed=seed) - reference > RESOLVED > run.final - reference


HEALTHY = {
    "usual": dict(rate=3e-3, sharpness=1.0),
    "high rate": dict(rate=1e-2, sharpness=1.0),
    "sharp, low rate": dict(rate=2e-3, sharpness=4.0),
    "short warmup": dict(rate=3e-3, sharpness=1.0, warmup=5),
    "muon": dict(rate=3e-3, sharpness=1.0, optimizer="muon"),
    "another seed": dict(rate=3e-3, sharpness=1.0, seed=7),
}
QUICKER = "usual"


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(r, id=n, marks=[pytest.mark.slow, *([] if n == QUICKER else [pytest.mark.exhaustive])])
        for n, r in HEALTHY.items()
    ],
)
def test_a_monitor_that_may_act_leaves_a_healthy_run_bit_for_bit_alone(recipe):
    alone, watched = Run(**recipe), Run(**recipe)
    for batch in islice(alone.loader, STEPS):
        alone.train_step(batch)
    with AttentionStabilityMonitor(
        watched.model, log_every=5, auto_intervene=True, good_states=watched.states()
    ) as monitor:
        for batch in islice(watched.loader, STEPS):
            watched.train_step(batch)
            monitor.on_step()
        assert not monitor.applied and not monitor.status.off
    assert watched.losses == alone.losses
    assert all(torch.equal(a, b) for a, b in zip(alone.model.parameters(), watched.model.parameters()))
