"""QK-clip on the layouts of transformers' models and of wrapped ones, each beside one optimizer."""

import pytest
import transformers
from attention_layers import SIZES
from odd_layers import Fused, Grouped, Separate, normed, rotated
from test_layouts_and_optimizers import LAYOUTS, OPTIMIZERS, alone, check_clip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.exhaustive,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
GROUPED = {"num_key_value_heads": 2}


def of_transformers(name, **more):
    """A model with one layer of that family."""

    def build():
        cls = getattr(transformers, f"{name}ForCausalLM", None) or getattr(transformers, f"{name}Model")
        return cls(getattr(transformers, f"{name}Config")(**{**SIZES, **more})).eval()

    return build


def in_fp64(build):
    return lambda: build().double()


#: name -> (model, whether it can be clipped, whether its scores are not q.k alone)
MORE = {
    **{
        name: (of_transformers(name), True, False)
        for name in (
            "Phi", "Starcoder2", "Olmo", "Granite", "Cohere", "Falcon", "OPT", "XGLM", "BioGpt", "GPTBigCode", "Bert",
            "Roberta", "Electra", "DistilBert", "Albert", "Gemma2", "RoFormer", "MobileBert", "Camembert",
        )
    },
    **{f"{name}, grouped": (of_transformers(name, **GROUPED), True, False) for name in ("Mistral", "Qwen2", "Phi")},
    "StableLm, grouped": (of_transformers("StableLm", **GROUPED), True, False),
    "Bloom, ALiBi": (of_transformers("Bloom"), True, True),
    "Mpt, ALiBi": (of_transformers("Mpt"), True, True),
    "Persimmon, QK-norm": (of_transformers("Persimmon"), False, False),
    "Qwen3, QK-norm": (of_transformers("Qwen3", head_dim=8, **GROUPED), False, False),
    "rotary, grouped": (alone(lambda: Separate(groups=2, inside=rotated)), True, False),
    "rotary, fused per head": (alone(lambda: Fused("heads, kinds", inside=rotated)), True, False),
    "a group for each head": (alone(lambda: Grouped(4)), True, False),
    "Llama, fp64": (in_fp64(of_transformers("Llama", **GROUPED)), True, False),
    "functional QK-norm, separate": (alone(lambda: Separate(inside=normed)), False, False),
    "fused, a scale of its own": (alone(lambda: Fused(scale=0.7)), True, False),
}  # fmt: skip


@pytest.mark.parametrize("kind", MORE)
def test_the_largest_score_is_the_threshold_and_nothing_else_moves(kind):
    build, treated, biased = MORE[kind]
    optimizers = list(OPTIMIZERS.values())
    check_clip(build, treated, biased, optimizers[list(MORE).index(kind) % len(optimizers)])


def test_there_are_sixty_layouts():
    assert len({*LAYOUTS, *MORE}) >= 60
