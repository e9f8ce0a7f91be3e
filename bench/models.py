"""The models that whole training steps are timed on, made from configurations with random weights."""

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def config(name: str, length: int, tiny: bool) -> GPT2Config | LlamaConfig:
    """GPT-2 124M, or the shape of Llama 3.2 1B, or a tiny model of the same family; all without dropout."""
    shape = {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
    if name == "gpt2":
        shape |= {"n_positions": length, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
        return GPT2Config(**shape | ({"n_embd": 64, "n_layer": 2, "n_head": 4} if tiny else {}))
    if tiny:
        shape |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 1024}
        return LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=1)
    return LlamaConfig(
        **shape,
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
    )


class Training:
    """A model with its optimizer and one batch; `step` trains it once."""

    def __init__(self, name: str, batch: int, length: int, tiny: bool = False):
        torch.manual_seed(0)
        shape = config(name, length, tiny)
        with torch.device(DEVICE):
            model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16, attn_implementation="sdpa")
            self.model = model.train()
            self.tokens = torch.randint(shape.vocab_size, (batch, length))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.monitor = None

    def step(self) -> None:
        self._finish(self.model(input_ids=self.tokens, labels=self.tokens).loss)
        if self.monitor is not None:
            self.monitor.on_step()

    def step_eager(self) -> list[torch.Tensor]:
        result = self.model(input_ids=self.tokens, labels=self.tokens, output_attentions=True)
        with torch.no_grad():
            entropies = [torch.special.entr(w.float()).sum(-1).mean((0, 2)) for w in result.attentions]
        self._finish(result.loss)
        return entropies

    def _finish(self, loss: torch.Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
