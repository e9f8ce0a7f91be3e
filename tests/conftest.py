"""Kernels run on the GPU where there is one, else through Triton's interpreter on the CPU."""

import gc
import os

import pytest
import torch
import torch.nn.functional as F

ON_GPU = torch.cuda.is_available()
PLAIN = F.scaled_dot_product_attention
# Tensors are tiny, so a second thread costs more time than it saves, here and in processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
# Triton reads this when it is imported, so it is set before any test imports a kernel.
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config):
    """Prepare the interpreter, and check at the end that the quick suite launched every option of every kernel."""
    if ON_GPU:
        return
    try:
        import triton  # noqa: F401
    except ImportError:
        return
    from interpreter import patch_language_once, skip_overflow_checks
    from kernel_options import LaunchedOptions

    patch_language_once()
    if config.option.markexpr == "not slow":
        skip_overflow_checks()
    config.pluginmanager.register(LaunchedOptions(), "launched-options")


def pytest_collection_modifyitems(items):
    if ON_GPU:
        return
    skip = pytest.mark.skip(reason="without a GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def functions_are_given_back():
    """A monitor that a test drops in a cycle replaces functions until it is collected. The next test would see that."""
    if F.scaled_dot_product_attention is not PLAIN:
        gc.collect()


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors: waiting for a second thread takes longer than the work, beside other processes twenty times."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def device():
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture(scope="session")
def host():
    """The sm_90 forward on the host, where it runs."""
    from hnf_attention.engine import engines
    from hnf_attention.engine.card import card_of

    reason = engines.hopper_runs_on(card_of(torch.device("cuda", 0)))
    if reason is not None:
        pytest.skip(reason)
    from hnf_attention.kernels.hopper import host

    return host
