"""Every architecture of the list is measured, unchanged, and docs/architectures.md says so."""

import re

import pytest
from architectures import ARCHITECTURES
from examined import KINDS, MARKED, PAGE, VERSION, examined, filled

pytestmark = [
    # What models of transformers 4 do on their own.
    pytest.mark.filterwarnings("ignore:The `device` argument is deprecated"),
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence"),
    pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask"),
]

#: One of each kind for every combination of interceptors, and of what changes the scores. The rest are slow.
QUICK = """AST; BERT; BLIP; BLOOM; CANINE; DeepSeek-V2; DiffLlama; Falcon; GPT-2; Gemma 2; I-BERT; JetMoE; LongT5;
Mistral; PVT; ProphetNet; SEW-D; SigLIP vision; Swin; T5; WavLM; XLNet; gpt-oss"""


def _names():
    quick = QUICK.replace("\n", " ").split("; ")
    assert ARCHITECTURES.keys() >= set(quick)
    return [pytest.param(x, marks=() if x in quick else pytest.mark.slow) for x in ARCHITECTURES]


@pytest.mark.parametrize("name", _names())
def test_is_measured_and_unchanged(name):
    architecture = ARCHITECTURES[name]
    if not architecture.exists:
        pytest.skip(f"transformers {VERSION} has no {architecture.model}")
    assert architecture.kind in KINDS
    for implementation in architecture.compared():
        found = examined(name, implementation)
        assert found.output and found.gradients, found
        assert found.fused_output < 1e-5 and found.fused_gradients < 1e-3, found
        # Nothing is silent: what the model returns is measured or listed, and nothing else is measured.
        unmatched = found.returned - len(found.gaps)
        if architecture.incomparable:
            assert found.matched == 0 and len(found.others) == unmatched > 0, found
            continue
        assert found.matched == unmatched, found
        unreturned = architecture.unreturned
        assert all(unreturned and unreturned in x for x in found.others), found
        listed = architecture.listed
        assert bool(listed) == bool(found.gaps) and all(listed in x for x in found.gaps), found
        assert found.sharpness > 1.5, found  # uniform weights would hide a mistake


def test_at_least_60_are_measured_with_softmax_attention():
    names = [name for name, architecture in ARCHITECTURES.items() if not architecture.listed]
    assert len(names) >= 60
    specials = " ".join(ARCHITECTURES[name].special for name in names)
    for word in ("soft-cap", "sinks", "sliding window", "ALiBi", "position bias", "MLA"):
        assert word in specials


@pytest.mark.slow
def test_the_page_has_the_table_of_these_results():
    if not PAGE.is_file():
        pytest.skip("the documentation is in the checkout only")
    text = PAGE.read_text(encoding="utf-8")
    made_with = re.search(r"models of transformers (\d+)\.(\d+)", MARKED.search(text)[0])
    if tuple(map(int, VERSION.split("."))) < tuple(map(int, made_with.groups())):
        pytest.skip(f"the table is that of transformers {'.'.join(made_with.groups())}, this is {VERSION}")
    assert filled(text) == text, "expected the table of `python tests/examined.py --write`"
