"""Small attention layers in the layouts that models use, as their users write or load them."""

import torch
import transformers
from torch import nn

SIZES = dict(vocab_size=40, num_hidden_layers=1, hidden_size=32, num_attention_heads=4, intermediate_size=16)
TOKENS = torch.randint(0, 40, (2, 20), generator=torch.Generator().manual_seed(0))


class PlainBlock(nn.Module):
    """Attention written by a user, with one fused projection as timm and nanoGPT have it."""

    def __init__(self, name):
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(32, 96))

    def forward(self, x):
        q, k, v = getattr(self, self.name)(x).view(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v)


class Outer(nn.Module):
    """Projections in one module, the attention call in a module inside of it."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(32, width) for width in (32, 16, 16))
        self.inner = Inner()

    def forward(self, x):
        projections = (self.q_proj, self.k_proj, self.v_proj)
        return self.inner(*(p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in projections))


class Inner(nn.Module):
    def forward(self, q, k, v):
        return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


class Multihead(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True, **options)

    def forward(self, x):
        other = x[..., : self.attention.kdim]
        return self.attention(x, other, other, need_weights=False)[0]


def hugging_face(config, model_class, **forward):
    def build():
        model = model_class(config)
        return model, lambda: model(TOKENS, **forward)

    return build


def plain(make_module):
    def build():
        model = nn.Sequential(nn.Embedding(40, 32), make_module())
        return model, lambda: model(TOKENS)

    return build


class Strange(nn.Module):
    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def weights(model):
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


GPT2 = transformers.GPT2Config(vocab_size=40, n_layer=1, n_embd=32, n_head=4, n_positions=32)
LLAMA = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
