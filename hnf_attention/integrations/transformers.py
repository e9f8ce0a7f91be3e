"""`attn_implementation="hnf_attention"` for Hugging Face transformers. Importing this registers the name.

```python
import hnf_attention.integrations.transformers
model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="hnf_attention")
```
"""

from __future__ import annotations

from ..nn.rows import row_stats
from ..nn.transformers import NAME, attention_forward, register

__all__ = ["NAME", "attention_forward", "register", "row_stats"]

register()
