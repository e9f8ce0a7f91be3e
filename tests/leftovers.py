"""A fixture for tests of treatments: at the end of each test nothing of them is left in place."""

import pytest
import torch.nn.functional as F

from hnf_attention.instrumentation.treated import Treated
from hnf_attention.interventions import QKClip
from hnf_attention.interventions.qk_norm import QKNormStart


@pytest.fixture(autouse=True)
def leave_nothing_behind(monkeypatch):
    """End the clips, norms and changed calls that a test made, also those of copies that it let go."""
    original, ends = F.scaled_dot_product_attention, []

    def note(cls, name, end):
        plain = getattr(cls, name)

        def noted(made, *args, **named):
            plain(made, *args, **named)
            ends.append(lambda: end(made))

        monkeypatch.setattr(cls, name, noted)

    def release(treated):
        while treated._patches:
            treated._patches.pop().release()

    note(QKClip, "__init__", QKClip.remove)
    note(QKNormStart, "__init__", QKNormStart.revert)
    note(Treated, "hold", release)
    yield
    monkeypatch.undo()
    while ends:
        ends.pop()()
    assert F.scaled_dot_product_attention is original
