"""From what is known of a root to its cause, on cases that are written by hand, and what is said of each."""

import math

import pytest

from hnf_attention.diagnosis.triage import CAUSES, causes
from hnf_attention.diagnosis.triage.case import FITS, NOT_FINITE, TOO_LARGE, Case, Numbers, Place
from hnf_attention.diagnosis.triage.records import (
    BACKWARD,
    BATCH,
    BUFFER,
    CLIPPING,
    FORWARD,
    OPTIMIZER,
    PARAMETER,
    SCALING,
    STATE,
    Operation,
    Source,
    TensorRecord,
)
from hnf_attention.diagnosis.triage.roots import OPERATION, SOURCE, UNSEEN, Root
from hnf_attention.diagnosis.triage.wording import SUGGESTIONS, evidence_of

SCORES = Place("h.1.attn", True, (3,), "scores", 0, 5, "scores", ("scores", "out"))
MLP = Place("h.1.mlp")
NOWHERE = Place()


def case(name, numbers=Numbers(), place=MLP, phase=FORWARD, size=2.0, dtype="float32", **more):  # noqa: B008
    """An operation whose finite inputs reach `size`. more: constants, next, state, masked."""
    read = TensorRecord("self", 1, (2, 4), dtype, -size, size)
    made = TensorRecord("0", 2, (2, 4), dtype, 0.0, math.inf)
    operation = Operation(7, name, place.layer, phase, [read], [made], more.get("constants", ()))
    root = Root(OPERATION, operation, made, masked=more.get("masked", False))
    following = tuple(
        Operation(8, f"aten.{x}.default", place.layer, phase, [made], []) for x in more.get("next", ())
    )
    return Case(root, numbers, place, following, more.get("state", ""), "torch 2.13")


def given(source, place=MLP, values=(math.nan, math.nan), shape=(2, 4)):
    """A tensor that the run was given."""
    read = TensorRecord("other", 1, shape, "float32", *values)
    operation = Operation(7, "aten.add.Tensor", place.layer, FORWARD, [read], [])
    return Case(Root(SOURCE, operation, read, source), Numbers(), place)


LARGE, TRUE, FIT = Numbers(TOO_LARGE, 1e41), Numbers(NOT_FINITE), Numbers(FITS, 3.0)
SDPA, BACK = (
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_cudnn_attention_backward.x",
)
LOW = Numbers(FITS, 3.0, scores=120.0, least_lse=-118.0)
CASES = [
    (causes.NAIVE_SOFTMAX, case("aten.exp.default", LARGE, SCORES, size=89.3, next=["sum"]), "reaching 89.3"),
    (causes.NAIVE_SOFTMAX, case("aten.exp.default", TRUE, SCORES, size=800.0, next=["sum"], masked=True), "88.7"),
    (causes.FP16_PRODUCT, case("aten.bmm.default", LARGE, SCORES, dtype="float16"), "largest float16 (65504)"),
    (causes.PRODUCT, case("aten.bmm.default", LARGE, SCORES), "bmm of q and k reaching 1e+41"),
    (causes.PRODUCT, case(SDPA, Numbers(FITS, 1.0, scores=1e40), SCORES), "reaching 1e+40, above the largest"),
    (causes.PRODUCT, case("flash_attn.fwd.default", Numbers(), SCORES, size=1e20), "up to 1e+20, whose product"),
    (causes.EMPTY_ROW, case("aten._softmax.default", TRUE, SCORES, masked=True), "batch 0, row 5 is the first"),
    (causes.MASK, given(Source(BUFFER, "h.1.attn.bias"), SCORES), "buffer h.1.attn.bias"),
    (causes.MASK, given(Source(BATCH, "attention_mask"), SCORES), "input attention_mask"),
    (causes.INPUT, given(Source(BATCH, "inputs_embeds")), "input inputs_embeds"),
    (causes.INPUT, given(None), "a tensor float32 (2, 4) that the run was given"),
    (causes.WEIGHT, given(Source(PARAMETER, "h.1.mlp.weight")), "parameter h.1.mlp.weight"),
    (causes.WEIGHT, given(Source(BUFFER, "norm.running_var")), "buffer norm.running_var"),
    (causes.OPTIMIZER_STATE, given(Source(STATE, "exp_avg", "h.1.mlp.weight")), "exp_avg of h.1.mlp.weight"),
    (causes.WRITTEN, given(None, values=(math.inf, math.inf), shape=()), "the constant inf"),
    (causes.WRITTEN, case("aten.fill_.Scalar", constants=(math.nan,)), "with the constant nan"),
    (causes.ACTIVATION, case("aten.addmm.default", LARGE, size=1e30), "addmm in h.1.mlp reaching 1e+41"),
    (causes.ACTIVATION, case("aten.native_layer_norm.default", FIT, size=1e30), "what it computes on the way"),
    (causes.ACTIVATION, case("aten.exp.default", LARGE, size=200.0), "exp in h.1.mlp"),
    (causes.UNDEFINED, case("aten.div.Tensor", TRUE), "not finite in double precision either"),
    (causes.UNDEFINED, case("aten.div.Tensor", TRUE, phase=BACKWARD), "not finite in double precision either"),
    (causes.NO_TARGETS, case("aten.nll_loss_forward.default", Numbers(NOT_FINITE, no_targets=True)), "0 / 0"),
    (causes.KERNEL, case("aten.mm.default", FIT), "double precision gives 3; torch 2.13"),
    (causes.KERNEL, case(SDPA, FIT, SCORES), "which gave results that are not finite from finite inputs"),
    (causes.KERNEL, case(BACK, LOW, SCORES, phase=BACKWARD), "exp(-lse) is inf in float32 below -88.7"),
    (causes.KERNEL, case("other.norm.default", Numbers()), "norm, which gave results"),
    (causes.GRADIENT, case("aten.mm.default", LARGE, phase=BACKWARD, dtype="float16"), "above the largest float16"),
    (causes.GRADIENT, case(BACK, LARGE, SCORES, phase=BACKWARD), "reaching 1e+41"),
    (causes.GRADIENT, case("aten.mul.Tensor", LARGE, NOWHERE, SCALING), "the loss traced to mul"),
    (causes.GRADIENT, case("aten.linalg_vector_norm.default", FIT, NOWHERE, CLIPPING), "linalg_vector_norm"),
    (causes.SCALER, case("aten.reciprocal.default", TRUE, NOWHERE, SCALING, size=0.0), "the scale has fallen to"),
    (causes.EPSILON, case("aten.addcdiv_.default", Numbers(zero_denominator=True), MLP, OPTIMIZER), "is 0"),
    (causes.SECOND_MOMENT, case("aten.addcmul_.default", LARGE, MLP, OPTIMIZER, state="exp_avg_sq"), "exp_avg_sq"),
    (causes.SECOND_MOMENT, case("aten._fused_adamw_.x", Numbers(overflowed=("exp_avg_sqs[1]",)), MLP, OPTIMIZER), ""),
    (causes.UPDATE, case("aten.add_.Tensor", LARGE, MLP, OPTIMIZER), "add_"),
]  # fmt: skip


@pytest.mark.parametrize("cause, made, said", CASES, ids=[f"{n} {x[0]}" for n, x in enumerate(CASES)])
def test_a_case_has_its_cause_and_its_sentence(cause, made, said):
    assert causes.find_cause(made) == cause
    evidence = evidence_of(made, cause)
    assert said in evidence and " traced to " in evidence and "None" not in evidence, evidence


def test_memory_of_another_kernel_is_its_fault():
    read = TensorRecord("self", 1, (2,), "float32", math.nan, math.nan)
    made = Case(Root(UNSEEN, Operation(7, "aten.add.Tensor", "h.1", FORWARD, [read], []), read), place=MLP)
    assert causes.find_cause(made) == causes.KERNEL
    assert "a kernel outside of PyTorch's operators" in evidence_of(made, causes.KERNEL)


def test_every_cause_has_a_case_and_a_suggestion():
    assert {x[0] for x in CASES} == set(CAUSES) - {causes.UNTRACED}
    assert set(SUGGESTIONS) == set(CAUSES)
