"""Actions under data parallelism: every process does the same, and it is what one process does with the whole batch."""

import socket

import processes_actions
import pytest
import torch
from processes import by_scenario, needs_gloo, start
from processes_actions import SCENARIOS, X

pytestmark = [
    pytest.mark.slow,
    needs_gloo,
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By scenario, what each process found."""
    folder = tmp_path_factory.mktemp("actions")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(free.getsockname()[1]))
    start(processes_actions.main, (2, str(folder)), 2)
    return by_scenario(folder, 2)


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "one clip, fsdp"])
def test_processes_agree_with_one_process(found, name):
    first, second = found[name]
    assert not isinstance(first, str), first
    assert first.keys() == second.keys()
    assert all(torch.equal(first[x], second[x]) for x in first)
    alone = SCENARIOS[name][0](lambda model: model, X)
    assert alone.keys() == {x.removeprefix("module.") for x in first}
    for x, value in alone.items():
        torch.testing.assert_close(
            first[x], value, rtol=2e-3, atol=2e-4, msg=lambda text, x=x: f"{x}: {text}"
        )


def test_shards_are_scaled_and_come_back_bit_for_bit(found):
    for process in found["one clip, fsdp"]:
        assert not isinstance(process, str), process
        before, between, after = process
        assert not torch.equal(before["attention.qkv.weight"], between["attention.qkv.weight"])
        assert all(torch.equal(before[x], after[x]) for x in before)
