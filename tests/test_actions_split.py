"""Actions where heads are split over processes, alone and with FSDP2: what one process does with the whole batch."""

import processes_split
import pytest
import torch
from processes import by_scenario, needs_gloo, start
from processes_split import SCENARIOS, alone
from sharded_models import LLAMA

pytest.importorskip("transformers.distributed", reason="needs a transformers that splits models itself")
pytestmark = [
    pytest.mark.slow,
    needs_gloo,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a LLaMA, then with what each process found."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("split")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(folder)
    start(processes_split.main, (4, str(folder)), 4)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    """By scenario, what each process found."""
    return by_scenario(folder, 4)


def same(processes, expected):
    """Up to the last digits, which differ between matrix products of other shapes."""
    for process in processes:
        assert not isinstance(process, str), process
        assert process.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(process[name], processes[0][name]), name
            torch.testing.assert_close(
                process[name], value, rtol=2e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("name", list(SCENARIOS))
def test_split_heads_are_treated_as_in_one_process(found, name):
    same(found[name], SCENARIOS[name][0](alone))


def test_keys_of_several_processes_are_refused_before_anything_changes(found):
    for (norm, clip), unchanged in found["refused"]:
        assert unchanged
        assert norm == "tensor parallelism splits its queries, and several processes hold the same keys"
        assert (
            "layer '' to be split by rows into 4 parts, as ColwiseParallel splits them, got a whole one"
            in clip
        )


def test_a_pipeline_with_one_split_stage_is_treated_as_each_stage_in_one_process(found):
    for stage in range(2):
        both = [each[1] for each in found["pipeline"] if each[0] == stage]
        assert len(both) == 2, found["pipeline"]
        same(both, processes_split.staged(processes_split.Stage(stage), processes_split.X))


def test_a_llama_that_its_own_plan_splits_is_treated_as_in_one_process(found, folder):
    same(found["llama"], processes_split.llama(folder))
