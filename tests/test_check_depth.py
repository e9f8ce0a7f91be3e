"""Deep models: the check computes layers that are alike once, and refuses depths that no model has."""

import pytest

from hnf_attention import check_attention_stability
from hnf_attention.precheck import predict
from hnf_attention.precheck.configuration import MOST_LAYERS, read_design

SIZES = {"d_model": 128, "n_heads": 8, "seq_len": 256}
KINDS = ["full_attention", "sliding_attention"]


@pytest.mark.parametrize("depth", [MOST_LAYERS + 1, 10**9, 10**30])
@pytest.mark.parametrize("given", [{}, {"model_type": "gemma2", "hidden_size": 128}])
def test_more_layers_than_any_model_has_are_refused(depth, given):
    with pytest.raises(ValueError, match="expected at most 10,000 layers in n.*layers, got"):
        check_attention_stability(
            config=SIZES | given | {"num_hidden_layers" if given else "n_layers": depth}
        )


def test_layers_that_are_alike_are_computed_once(monkeypatch):
    computed = []
    original = predict.predict_layer
    monkeypatch.setattr(
        predict, "predict_layer", lambda design, layer: computed.append(layer) or original(design, layer)
    )
    design = read_design(SIZES | {"n_layers": MOST_LAYERS})
    layers = predict.predict_layers(design)
    assert computed == [0] and len(layers) == MOST_LAYERS and layers[-1].layer == f"layer {MOST_LAYERS - 1}"
    design = read_design(SIZES | {"n_layers": 6, "window": 16, "layer_types": KINDS * 3})
    assert predict.predict_layers(design) == [original(design, layer) for layer in range(6)]
    assert computed == [0, 0, 1]
