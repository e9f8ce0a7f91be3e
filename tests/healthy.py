"""Healthy models, which the diagnosis has to leave alone. Each says in one line why it is healthy."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers as t
from torch import nn

HEADS, DIM, LENGTH, BATCH, VOCAB = 4, 16, 64, 4, 96
WIDTH = HEADS * DIM
Run = Callable[[int], object]


@dataclass(frozen=True)
class Healthy:
    """why: what makes it healthy. build: makes the model, and what runs its n-th batch and returns a loss or None."""

    why: str
    build: Callable[[], tuple[nn.Module, Run]]


def tokens(length=LENGTH, seed=0):
    return torch.randint(3, VOCAB, (BATCH, length), generator=torch.Generator().manual_seed(seed))


def content(length=LENGTH, seed=0):
    return torch.randn(BATCH, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def padding(side, length=LENGTH):
    """1 for tokens, 0 for padding: one sentence in four has the full length."""
    places = torch.arange(length)
    kept = torch.stack([places < n for n in (length, length // 2, length // 3, length // 4)]).long()
    return kept if side == "right" else kept.flip(1)


# Layers whose scores of content are near 1


class Attention(nn.Module):
    """Self-attention; `options` are those of scaled_dot_product_attention. The subclasses change what it attends to."""

    def __init__(self, causal=False, groups=HEADS, **options):
        super().__init__()
        self.causal, self.groups, self.options = causal, groups, options
        self.q, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, groups * DIM)
        self.k = nn.Linear(WIDTH, groups * DIM)
        for layer in (self.q, self.k):
            nn.init.normal_(layer.weight, std=WIDTH**-0.5)

    def forward(self, x, context=None):
        context = x if context is None else context
        inputs = ((self.q, x), (self.k, context), (self.v, context))
        q, k, v = (p(y).unflatten(-1, (-1, DIM)).transpose(1, 2) for p, y in inputs)
        return self.attend(q, k, v).transpose(1, 2).flatten(2)

    def attend(self, q, k, v):
        gqa = self.groups != HEADS
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=gqa, **self.options)


class Patterns(Attention):
    """Head h gives that weight to the keys targets[h](row, n), evenly; None is content alone."""

    def __init__(self, targets, weight=0.8, **options):
        super().__init__(**options)
        self.targets, self.weight = targets, weight

    def attend(self, q, k, v):
        n, size = q.shape[2], len(q)
        places = torch.eye(n, dtype=q.dtype)
        wanted = torch.zeros(HEADS, n, n, dtype=q.dtype)
        for head, target in enumerate(self.targets):
            for row in range(n if target is not None else 0):
                keys = torch.tensor(target(row, n)).reshape(-1)
                gain = torch.logit(torch.tensor(self.weight)) + math.log(n / len(keys))
                wanted[head, row] = gain * places[keys].sum(0)
        q = torch.cat([q * DIM**-0.5, wanted.expand(size, -1, -1, -1)], -1)
        k = torch.cat([k, places.expand(size, HEADS, -1, -1)], -1)
        out = F.scaled_dot_product_attention(q, k, F.pad(v, (0, n)), is_causal=self.causal, scale=1.0)
        return out[..., :DIM]


class KeyBias(Attention):
    """One number, about 60, on all scores of a row: a bias of the keys meets a constant part of the queries."""

    def attend(self, q, k, v):
        q, k = F.pad(q, (0, 1), value=15.0), F.pad(k, (0, 1), value=16.0)
        return F.scaled_dot_product_attention(q, k, F.pad(v, (0, 1)), scale=DIM**-0.5)[..., :DIM]


class SoftmaxAttention(Attention):
    """Written out. bias: of the scores, (H, M, N). cap: a soft-cap."""

    def __init__(self, bias=None, cap=None):
        super().__init__()
        self.bias, self.cap = bias, cap

    def attend(self, q, k, v):
        scores = q @ k.transpose(-1, -2) * DIM**-0.5
        scores = scores if self.cap is None else self.cap * torch.tanh(scores / self.cap)
        scores = scores if self.bias is None else scores + self.bias
        return scores.softmax(-1) @ v


class QKNorm(Attention):
    """Norms with gains of 1: no score passes sqrt(DIM)."""

    def attend(self, q, k, v):
        return super().attend(F.rms_norm(q, (DIM,)), F.rms_norm(k, (DIM,)), v)


class Repeated(nn.Module):
    """One block, run four times."""

    def __init__(self):
        super().__init__()
        self.block, self.norm = Attention(), nn.LayerNorm(WIDTH)

    def forward(self, x):
        for _ in range(4):
            x = x + self.block(self.norm(x))
        return x


def previous(row, n):
    return max(row - 1, 0)


def induction(row, n):
    """The second half repeats the first: the token after its last occurrence. The first half rests on the first key."""
    return row - n // 2 + 1 if row >= n // 2 else 0


def sink(*places):
    """All rows of the head share these keys."""
    return lambda row, n: [place % n for place in places]


def delimiter(row, n):
    """The last of the delimiters, which are 16 tokens apart."""
    return row - row % 16


def alibi():
    slopes = 2.0 ** -torch.arange(2.0, 2.0 + 2 * HEADS, 2.0)
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    return torch.where(distance >= 0, -slopes.view(-1, 1, 1) * distance, -torch.inf)


def window(size):
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    return (distance >= 0) & (distance < size)


def layer(make, length=LENGTH, dtype=torch.float32):
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(make()).to(dtype)
        return model, lambda step: model(content(length, step).to(dtype)).float().square().mean()

    return build


def patterns(*targets, causal=False, **options):
    return layer(lambda: Patterns(targets, causal=causal, **options))


def cross():
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": Attention()})
    return (
        model,
        lambda step: model["attention"](content(24, step), content(LENGTH, step + 99)).square().mean(),
    )


def torch_layers(cls, mask=None, decoder=False, **options):
    def build():
        torch.manual_seed(0)
        kind = nn.TransformerDecoderLayer if decoder else nn.TransformerEncoderLayer
        model = cls(kind(WIDTH, HEADS, 2 * WIDTH, batch_first=True, **options), 2)
        hidden = None if mask is None else padding(mask) == 0

        def run(step):
            x = content(seed=step)
            if decoder:
                return model(x[:, :24], x, memory_key_padding_mask=hidden).square().mean()
            return model(x, src_key_padding_mask=hidden).square().mean()

        return model, run

    return build


# Models of transformers as they start: weights of 0.02, nearly uniform attention


SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    num_hidden_layers=2,
    num_attention_heads=HEADS,
    intermediate_size=2 * WIDTH,
    max_position_embeddings=128,
    pad_token_id=0,
)
LLAMA = dict(SIZES, num_key_value_heads=2)
GPT2 = dict(vocab_size=VOCAB, n_embd=WIDTH, n_layer=2, n_head=HEADS, n_positions=128)
T5 = dict(vocab_size=VOCAB, d_model=WIDTH, d_kv=DIM, d_ff=2 * WIDTH, num_layers=2, num_heads=HEADS)


def family(model, config, length=LENGTH, mask=None, dtype=torch.float32, **inputs):
    def build():
        torch.manual_seed(0)
        made = model(config()).to(dtype).train()

        def run(step):
            given = {"input_ids": tokens(length, step), **inputs}
            if mask is not None:
                given["attention_mask"] = padding(mask, length)
            return made(**given)[0].float().square().mean()

        return made, run

    return build


def vision():
    torch.manual_seed(0)
    config = t.ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=WIDTH
    )
    config.image_size, config.patch_size = 32, 4
    model = t.ViTModel(config)
    return model, lambda step: model(torch.randn(BATCH, 3, 32, 32)).last_hidden_state.square().mean()


def decoding(model, config):
    """Generation with a cache: after the first forward, each has one query."""

    def build():
        torch.manual_seed(0)
        made = model(config()).eval()

        def run(step):
            with torch.no_grad():
                made.generate(
                    input_ids=tokens(20, step),
                    max_new_tokens=24,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                )

        return made, run

    return build


def trained():
    """Two layers, 150 steps on bytes of text at a moderate rate; its loss falls all along."""
    from hnf_attention.cli.demo.model import GPT, standard_library_text

    torch.manual_seed(0)
    text = standard_library_text(200_000).long()
    model = GPT(2, WIDTH, HEADS, LENGTH, 1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    def run(step):
        start = torch.randint(len(text) - LENGTH - 1, (16,), generator=torch.Generator().manual_seed(step))
        x = torch.stack([text[i : i + LENGTH + 1] for i in start.tolist()])
        return F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

    for step in range(150):
        optimizer.zero_grad()
        run(step).backward()
        optimizer.step()
    return model, lambda step: run(1000 + step)


#: Rests of a head: it looks at one key when it has nothing to say (Gu et al., arXiv 2410.10781).
REST = "heads rest on one key with 0.95 of the weight and read content with the rest, as in trained models"
START = "weights as they start: nearly uniform attention"
EVEN = "scores of content near 1"

HEALTHY = {
    "sink on the first key": Healthy(REST, patterns(*3 * [sink(0)], None, weight=0.95)),
    "sink on the last key": Healthy(REST, patterns(*3 * [sink(-1)], None, weight=0.95)),
    "sink in the middle": Healthy(REST, patterns(*3 * [sink(30)], None, weight=0.95)),
    "sinks on registers": Healthy(
        REST + "; they share four registers (Darcet et al., arXiv 2309.16588)",
        patterns(*3 * [sink(1, 2, 3, 4)], None, weight=0.95),
    ),
    "sharp sinks on registers": Healthy(
        "likewise, with 0.99 of the weight", patterns(*3 * [sink(1, 2, 3, 4)], None, weight=0.99)
    ),
    "sharp sinks on both ends": Healthy(
        "heads give 0.99 to the first and the last key together: [CLS] and [SEP]",
        patterns(*3 * [sink(0, -1)], None, weight=0.99),
    ),
    "sharp causal sinks on two keys": Healthy(
        "heads give 0.99 to the first token and the first full stop (Sun et al., arXiv 2402.17762)",
        patterns(*3 * [sink(0, 7)], None, causal=True, weight=0.99),
    ),
    "delimiter head": Healthy(
        "one head of four rests on the delimiter of its own sentence (Clark et al., arXiv 1906.04341)",
        patterns(delimiter, None, None, None, causal=True, weight=0.95),
    ),
    "sharp sinks on the first key": Healthy(
        "two heads give 0.99 to one key, as many of GPT-2's do; two read content",
        patterns(sink(0), sink(0), None, None, weight=0.99),
    ),
    "sharp sinks on the last key": Healthy(
        "likewise, on [SEP] (Clark et al., arXiv 1906.04341)",
        patterns(sink(-1), sink(-1), None, None, weight=0.99),
    ),
    "two sinks": Healthy(REST, patterns(sink(0), sink(-1), sink(0), None, weight=0.95)),
    "causal sink on the first key": Healthy(REST, patterns(*3 * [sink(0)], None, causal=True, weight=0.95)),
    "mild sinks everywhere": Healthy(
        "every head gives half of its weight to the first key and reads content with the rest",
        patterns(*[sink(0)] * 4, weight=0.5),
    ),
    "induction head": Healthy(
        "one head of four copies from repeated text (Olsson et al., arXiv 2209.11895)",
        patterns(induction, None, None, None, causal=True, weight=0.95),
    ),
    "previous-token head": Healthy(
        "one head of four looks one token back (Voita et al., arXiv 1905.09418)",
        patterns(previous, None, None, None, causal=True, weight=0.95),
    ),
    "previous-token head beside a sink": Healthy(
        "one head looks one token back, one rests on the first key, two read content",
        patterns(previous, sink(0), None, None, causal=True),
    ),
    "plain": Healthy(EVEN, layer(Attention)),
    "causal": Healthy(EVEN, layer(lambda: Attention(causal=True))),
    "sliding window": Healthy("16 visible keys, " + EVEN, layer(lambda: Attention(attn_mask=window(16)))),
    "narrow window": Healthy("8 visible keys, " + EVEN, layer(lambda: Attention(attn_mask=window(8)))),
    "short sequences": Healthy("8 tokens, " + EVEN, layer(Attention, length=8)),
    "short causal sequences": Healthy("12 tokens, " + EVEN, layer(lambda: Attention(causal=True), length=12)),
    "cross attention": Healthy("24 queries, 64 keys, " + EVEN, cross),
    "key bias": Healthy(
        "one number on a whole row is invisible to the softmax; else " + EVEN, layer(KeyBias)
    ),
    "key bias, written out": Healthy(
        "likewise, before a softmax of its own", layer(lambda: SoftmaxAttention(bias=torch.tensor(60.0)))
    ),
    "ALiBi": Healthy(
        "slopes from 1/4 down to 2^-8, as published for 4 heads",
        layer(lambda: SoftmaxAttention(bias=alibi())),
    ),
    "soft-cap": Healthy("scores near 1 under a cap of 30", layer(lambda: SoftmaxAttention(cap=30.0))),
    "QK-norm": Healthy("gains of 1: no score passes 4", layer(QKNorm)),
    "grouped queries": Healthy(EVEN, layer(lambda: Attention(groups=2))),
    "shared block": Healthy("one block, run four times, " + EVEN, layer(Repeated)),
    "bf16": Healthy(EVEN, layer(Attention, dtype=torch.bfloat16)),
    "fp16": Healthy(EVEN, layer(Attention, dtype=torch.float16)),
    "nn.TransformerEncoder": Healthy(START, torch_layers(nn.TransformerEncoder)),
    "nn.TransformerEncoder, padded right": Healthy(START, torch_layers(nn.TransformerEncoder, "right")),
    "nn.TransformerEncoder, padded left": Healthy(START, torch_layers(nn.TransformerEncoder, "left")),
    "nn.TransformerDecoder": Healthy(START, torch_layers(nn.TransformerDecoder, "right", decoder=True)),
    "GPT-2": Healthy(START, family(t.GPT2Model, lambda: t.GPT2Config(**GPT2))),
    "GPT-2 in bf16": Healthy(START, family(t.GPT2Model, lambda: t.GPT2Config(**GPT2), dtype=torch.bfloat16)),
    "GPT-2, decoding": Healthy(START, decoding(t.GPT2LMHeadModel, lambda: t.GPT2Config(**GPT2))),
    "BERT": Healthy(START, family(t.BertModel, lambda: t.BertConfig(**SIZES))),
    "BERT, padded right": Healthy(START, family(t.BertModel, lambda: t.BertConfig(**SIZES), mask="right")),
    "BERT, padded left": Healthy(START, family(t.BertModel, lambda: t.BertConfig(**SIZES), mask="left")),
    "ALBERT": Healthy(START, family(t.AlbertModel, lambda: t.AlbertConfig(**SIZES, embedding_size=32))),
    "LLaMA": Healthy(START, family(t.LlamaModel, lambda: t.LlamaConfig(**LLAMA))),
    "LLaMA, padded right": Healthy(START, family(t.LlamaModel, lambda: t.LlamaConfig(**LLAMA), mask="right")),
    "LLaMA, padded left": Healthy(START, family(t.LlamaModel, lambda: t.LlamaConfig(**LLAMA), mask="left")),
    "LLaMA, decoding": Healthy(START, decoding(t.LlamaForCausalLM, lambda: t.LlamaConfig(**LLAMA))),
    "Mistral": Healthy(
        "a window of 24 keys; " + START,
        family(t.MistralModel, lambda: t.MistralConfig(**LLAMA, head_dim=DIM, sliding_window=24)),
    ),
    "Mixtral": Healthy(
        "experts route tokens, not attention; " + START,
        family(t.MixtralModel, lambda: t.MixtralConfig(**LLAMA, num_local_experts=4)),
    ),
    "Gemma 2": Healthy(
        "scores under a cap of 50; " + START,
        family(t.Gemma2Model, lambda: t.Gemma2Config(**LLAMA, head_dim=DIM, query_pre_attn_scalar=DIM)),
    ),
    "Qwen 3": Healthy(
        "QK-norm; " + START, family(t.Qwen3Model, lambda: t.Qwen3Config(**LLAMA, head_dim=DIM))
    ),
    "T5": Healthy(
        START, family(t.T5Model, lambda: t.T5Config(**T5), mask="right", decoder_input_ids=tokens(20, 5))
    ),
    "ViT": Healthy(START, vision),
    "bytes, trained": Healthy("its loss falls at a moderate rate, from 5.5 to about 2.5", trained),
}
